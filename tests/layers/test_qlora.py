"""QLoRALinear: equals dq(W) plus a dense adapter, forward and every gradient, through PEFT."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from longfit.errors import ModelError
from longfit.layers.linear4bit import Linear4bit
from longfit.layers.linear8bit import Linear8bit
from longfit.layers.qlora import QLoRALinear
from longfit.model.adapters import register_layers


class Net(nn.Module):
    def __init__(self, in_features: int, out_features: int, bias: bool, kind: type = Linear4bit) -> None:
        super().__init__()
        self.proj = kind.from_linear(nn.Linear(in_features, out_features, bias=bias))

    def forward(self, x):
        return self.proj(x)


def adapted(in_features=128, out_features=96, *, bias=True, dropout=0.0, rank=4):
    config = LoraConfig(r=rank, lora_alpha=8, lora_dropout=dropout, target_modules=["proj"])
    register_layers(config)
    net = get_peft_model(Net(in_features, out_features, bias), config)
    layer = net.base_model.model.proj
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return net, layer


def dense_twin(layer, x, adapter_x=None):
    """The formula, written with plain dense tensors."""
    base = layer.get_base_layer()
    A = layer.lora_A["default"].weight.detach().to(x.dtype).requires_grad_()
    B = layer.lora_B["default"].weight.detach().to(x.dtype).requires_grad_()
    y = F.linear(x, base.dequantize(x.dtype), None if base.bias is None else base.bias.to(x.dtype))
    return y + layer.scaling["default"] * F.linear(F.linear(x if adapter_x is None else adapter_x, A), B), A, B


@pytest.mark.parametrize(("in_features", "out_features", "bias"), [(128, 96, True), (80, 33, False), (64, 7, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_dense_formula(in_features, out_features, bias, dtype):
    net, layer = adapted(in_features, out_features, bias=bias)
    assert isinstance(layer, QLoRALinear)
    layer.lora_A.to(dtype)
    layer.lora_B.to(dtype)
    x = torch.randn(2, 5, in_features, dtype=dtype)
    grad = torch.randn(2, 5, out_features, dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = net(a)
    y.backward(grad)
    expected, A, B = dense_twin(layer, b)
    expected.backward(grad)
    # The same products in another order: at most 128 + 4 additions of terms of size about 1.
    tolerance = {"rtol": 1e3 * torch.finfo(dtype).eps, "atol": 1e3 * torch.finfo(dtype).eps}
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(a.grad, b.grad, **tolerance)
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, A.grad, **tolerance)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, B.grad, **tolerance)


def test_bfloat16_is_no_worse_than_plain_bfloat16():
    """Against float64, we may not err more than the formula in plain bfloat16 does, but for one rounding."""
    net, layer = adapted()
    x = torch.randn(64, 128, dtype=torch.bfloat16)
    grad = torch.randn(64, 96, dtype=torch.bfloat16)
    results = []
    for dtype, fused in ((torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        leaf = x.clone().to(dtype).requires_grad_()
        layer.zero_grad()
        if fused:
            y = net(leaf)
            y.backward(grad)
            A_grad, B_grad = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        else:
            y, A, B = dense_twin(layer, leaf)
            y.backward(grad.to(dtype))
            A_grad, B_grad = A.grad, B.grad
        results.append([t.double() for t in (y.detach(), leaf.grad, A_grad, B_grad)])
    exact, plain, ours = results
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert (o - e).norm() <= 1.5 * (p - e).norm() + 2**-9 * e.norm()


def test_dropout_touches_the_adapter_only():
    net, layer = adapted(dropout=0.5)
    x = torch.randn(4, 128, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    net.train()
    torch.manual_seed(1)
    y = net(x)
    torch.manual_seed(1)
    expected, A, B = dense_twin(layer, twin_x, layer.lora_dropout["default"](twin_x))
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)  # float32, 128 additions
    torch.testing.assert_close(x.grad, twin_x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, A.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, B.grad, rtol=1e-4, atol=1e-4)


def test_keeps_no_sixteen_bit_weight():
    net, _ = adapted(256, 256)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        net(torch.randn(2, 256, dtype=torch.bfloat16, requires_grad=True))
    assert max(t.numel() for t in saved if t.is_floating_point()) < 256 * 256


def test_adapters_stay_fp32_and_the_base_frozen():
    net, layer = adapted()
    net(torch.randn(3, 128, dtype=torch.bfloat16)).sum().backward()
    trained = {name for name, p in net.named_parameters() if p.grad is not None}
    assert {name.rsplit(".", 3)[-3] for name in trained} == {"lora_A", "lora_B"}
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


def test_a_disabled_or_second_adapter_takes_peft_s_path():
    net, layer = adapted()
    x = torch.randn(3, 128)
    base = layer.get_base_layer()(x)
    with net.disable_adapter():
        torch.testing.assert_close(net(x), base)
    second = LoraConfig(r=2, lora_alpha=2, target_modules=["proj"])
    register_layers(second)
    net.add_adapter("second", second)
    nn.init.normal_(layer.lora_B["second"].weight)
    net.base_model.set_adapter(["default", "second"])
    expected = base + F.linear(x, layer.get_delta_weight("default") + layer.get_delta_weight("second"))
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)  # float32, 128 additions


def test_merging_gives_a_dense_layer_and_never_requantises():
    net, layer = adapted()
    x = torch.randn(3, 128)
    expected = net(x)
    with pytest.raises(ModelError, match="merge_and_unload"):
        layer.merge()
    merged = net.merge_and_unload().proj
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)  # float32, 128 additions


WAYS = {
    "rank-stabilised": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, iterated": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "mica": {"init_lora_weights": "mica"},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora under dropout": {"use_dora": True, "lora_dropout": 0.5},
    "dora, orthogonal, rank-stabilised": {"use_dora": True, "init_lora_weights": "orthogonal", "use_rslora": True},
    "pissa under dropout": {"init_lora_weights": "pissa", "lora_dropout": 0.5},
    "velora": {"velora_config": {"num_groups": 8}},
    "bdlora": {"use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 2}},
}


class DenseNet(nn.Module):
    """The base of `Net`, dense: it holds dq(W) in fp32."""

    def __init__(self, layer):
        super().__init__()
        self.proj = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.proj.weight.data = layer.dequantize(torch.float32)
        if layer.bias is not None:
            self.proj.bias.data = layer.bias.data.clone()

    def forward(self, x):
        return self.proj(x)


def quantized_and_dense(settings, *, in_features=128, out_features=96, bias=True, kind=Linear4bit):
    """The same adapter, moved off its start, on a quantised layer and, by PEFT alone, on a dense layer of dq(W)."""
    net = Net(in_features, out_features, bias, kind)
    dense = DenseNet(net.proj)
    pair = []
    for base in (net, dense):
        torch.manual_seed(0)  # orthogonal, gaussian and iterated starts draw numbers
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["proj"], **settings)
        register_layers(config)
        pair.append(get_peft_model(base, config))
    ours, theirs = (
        {name: p for name, p in peft.named_parameters() if "lora_" in name} for peft in pair
    )  # the same names, as in one adapter file
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        # The same start; PiSSA's singular vectors may come out with the other sign, A's and B's together.
        assert_close(parameter.abs(), theirs[name].abs())
        with torch.no_grad():
            theirs[name].add_(torch.randn_like(parameter) * 0.1)
            parameter.copy_(theirs[name])
    return pair


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # float32: 128 additions of terms of size 1


@pytest.mark.parametrize("way", [*WAYS, "plain"])
@pytest.mark.parametrize(("in_features", "out_features"), [(128, 96), (80, 34)])
@pytest.mark.parametrize("kind", [Linear4bit, Linear8bit])
def test_peft_s_ways_equal_a_dense_base_that_holds_dq_w(way, in_features, out_features, kind):
    settings = WAYS.get(way, {})
    quantized, dense = quantized_and_dense(settings, in_features=in_features, out_features=out_features, kind=kind)
    rows = quantized.base_model.model.proj.get_base_layer().weight.clone()
    x = torch.randn(2, 5, in_features)
    grad = torch.randn(2, 5, out_features)
    outputs = []
    for model in (quantized, dense):
        torch.manual_seed(1)  # dropout
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(grad)
        outputs.append([y.detach(), leaf.grad, *(p.grad for n, p in model.named_parameters() if p.grad is not None)])
    for actual, expected in zip(*outputs, strict=True):
        assert_close(actual, expected)
    quantized.eval()
    dense.eval()
    expected = quantized(x)
    assert_close(expected, dense(x))
    merged = copy.deepcopy(quantized).merge_and_unload().proj
    assert type(merged) is nn.Linear
    assert_close(merged(x), expected)
    unloaded = quantized.unload().proj
    assert isinstance(unloaded, kind)
    assert torch.equal(unloaded.weight, rows)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_taken_out_of_the_base_changes_nothing_until_it_is_trained(start):
    net = Net(128, 96, True)
    x = torch.randn(3, 128)
    expected = net(x)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["proj"], init_lora_weights=start)
    register_layers(config)
    model = get_peft_model(net, config)
    assert model.base_model.model.proj.lora_B["default"].weight.abs().max() > 0
    assert_close(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    layer = model.base_model.model.proj
    layer.set_scale("default", 3)  # the base keeps what was taken at the first scale
    tripled = expected + 2 * layer.starts["default"](x)
    assert_close(model.merge_and_unload().proj(x), tripled)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}])
def test_an_adapter_file_is_loaded_again(settings, tmp_path):
    model, _ = quantized_and_dense(settings)
    x = torch.randn(3, 128)
    expected = model(x)
    model.save_pretrained(str(tmp_path))
    base = Net(128, 96, True)
    base.load_state_dict(model.unload().state_dict())
    for low_cpu_mem_usage in (False, True):
        if low_cpu_mem_usage and settings.get("init_lora_weights") == "pissa":
            continue  # PEFT itself cannot take singular vectors on the meta device
        config = LoraConfig.from_pretrained(str(tmp_path))
        register_layers(config)
        loaded = PeftModel.from_pretrained(
            copy.deepcopy(base), str(tmp_path), config=config, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert_close(loaded(x), expected)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga'"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "with use_dora"),
        ({"target_modules": None, "target_parameters": ["proj.weight"]}, "target_parameters 'weight'"),
    ],
)
def test_ways_that_a_quantised_base_cannot_carry_are_refused_by_name(settings, problem):
    net = Net(128, 96, True)
    settings = dict(settings)
    start = settings.pop("init_lora_weights", True)
    config = LoraConfig(**({"r": 4, "target_modules": ["proj"]} | settings))
    config.init_lora_weights = start  # afterwards: as an argument, LoftQ asks for scipy first
    register_layers(config)
    with pytest.raises(ModelError, match=problem):
        get_peft_model(net, config)
    assert isinstance(net.proj, Linear4bit)  # nothing was built


def test_merging_a_bias_needs_a_bias_to_add_it_to():
    model, _ = quantized_and_dense({"lora_bias": True}, bias=False)
    with pytest.raises(ModelError, match="lora_bias"):
        model.merge_and_unload()
