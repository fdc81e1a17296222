"""Fused norms and gated products: which modules are recognised, which are not, and that a swept layer stays right."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tests.tiny_models import VOCABULARY, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from longfit.engine.hf_model import base_model
from longfit.engine.loss.training_loss import training_loss
from longfit.engine.sweep.fused_modules import GatedMlp, Norm, as_gated_mlp, as_norm, find_fused, fused_forwards
from longfit.engine.sweep.install import enable_sweep
from longfit.engine.sweep.sweeper import sweeper_of
from longfit.kernels.cpu import elementwise as cpu_elementwise

UNSUPPORTED = cpu_elementwise.supported()
runs_here = pytest.mark.skipif(UNSUPPORTED is not None, reason=f"C++ elementwise kernels: {UNSUPPORTED}")


BOTH = (torch.bfloat16, torch.float32)
NOISE = {torch.bfloat16: 1.1, torch.float32: 2**0.5}
"""How much further from float64 than torch. In bf16 the same values are rounded at the same places. In float32 every
sum and exponential has roundings of its own, and of those the kernels have at most twice as many."""


def kinds(family):
    layer = base_model(tiny_model(family, dtype=torch.bfloat16)).model.layers[0]
    names = {module: name for name, module in layer.named_modules()}
    found = find_fused(layer)
    assert all(fused.dtypes == BOTH for fused in found)
    return {names[fused.module]: type(fused) for fused in found}


@runs_here
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_and_its_kin_are_recognised(family):
    found = kinds(family)
    expected = {"input_layernorm": Norm, "post_attention_layernorm": Norm, "mlp": GatedMlp}
    if family == "qwen3":
        expected |= {"self_attn.q_norm": Norm, "self_attn.k_norm": Norm}
    assert found == expected


@runs_here
def test_a_norm_that_peft_trains_as_a_copy_is_recognised():
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["input_layernorm"])
    layer = base_model(get_peft_model(tiny_model("llama", dtype=torch.bfloat16), config)).model.layers[0]
    copy = layer.input_layernorm.modules_to_save["default"]
    assert copy.weight.requires_grad
    assert copy in {fused.module for fused in find_fused(layer)}


@runs_here
def test_other_functions_keep_their_own_forward():
    assert kinds("gemma2") == {}  # weights of one plus w, gelu
    assert set(kinds("phi3").values()) == {Norm}  # gate and up are one projection


@runs_here
def test_nothing_is_asked_of_a_model_without_numbers():
    with FakeTensorMode():
        assert find_fused(nn.Sequential(Mlp(lambda _, gate, up: F.silu(gate) * up))) == ()


class Mlp(nn.Module):
    """A gated MLP whose product is made by ``combine``."""

    def __init__(self, combine):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(12, 20), nn.Linear(12, 20)
        self.down_proj, self.combine = nn.Linear(20, 12), combine

    def forward(self, x):
        return self.down_proj(self.combine(self, self.gate_proj(x), self.up_proj(x)))


@pytest.mark.parametrize(
    ("combine", "recognised"),
    [
        (lambda _, gate, up: F.silu(gate) * up, BOTH),
        (lambda _, gate, up: up * F.silu(gate), BOTH),
        (lambda _, gate, up: F.silu(up) * gate, ()),
        (lambda _, gate, up: F.silu(gate.clamp(max=7.0)) * up, ()),
        (lambda _, gate, up: F.silu(gate * 1.702) * up, ()),
        (lambda _, gate, up: F.silu(gate) * up * (1 + 2e-6), BOTH[:1]),  # more than roundings explain; none in bf16
        (lambda _, gate, up: F.silu(gate).bfloat16().to(gate.dtype) * up, BOTH[:1]),
        (lambda _, gate, up: (F.silu(gate.float()) * up.float()).to(gate.dtype), BOTH[1:]),  # rounds once, not twice
        (lambda self, gate, up: F.dropout(F.silu(gate) * up, 0.1, training=self.training), ()),
        (lambda self, gate, up: self.down_proj(F.silu(gate) * up)[..., :1].expand_as(up), ()),
    ],
)
def test_an_mlp_is_recognised_by_what_it_computes(combine, recognised):
    mlp = Mlp(combine)
    before = {name: dict(vars(module)) for name, module in mlp.named_modules()}
    fused = as_gated_mlp(mlp)
    assert (() if fused is None else fused.dtypes) == recognised
    assert {name: dict(vars(module)) for name, module in mlp.named_modules()} == before


def test_an_mlp_with_parameters_of_its_own_is_not_recognised():
    mlp = Mlp(lambda self, gate, up: F.silu(gate) * up * self.scale)
    mlp.scale = nn.Parameter(torch.ones(20))  # multiplies by 1 now, and trains
    assert as_gated_mlp(mlp) is None


def test_modules_that_somebody_watches_are_shown_nothing_and_not_passed_by():
    mlp = Mlp(lambda self, gate, up: self.act(gate) * up)
    mlp.act = nn.SiLU()
    fused = as_gated_mlp(mlp)
    assert fused is not None
    seen = []
    hook = mlp.act.register_forward_hook(lambda *_: seen.append("act"))
    with fused_forwards((fused,)):
        assert "forward" not in vars(mlp)
        mlp(torch.zeros(1, 3, 12))
    assert seen == ["act"]
    hook.remove()
    with fused_forwards((fused,)):
        assert "forward" in vars(mlp)
    mlp.up_proj.register_forward_pre_hook(lambda *_: seen.append("up"))
    assert as_gated_mlp(mlp) is None
    assert seen == ["act"]


class TimesOnePlusWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(16)), 1e-6

    def forward(self, x):
        return F.rms_norm(x.float(), (16,), eps=self.eps).to(x.dtype) * (1 + self.weight)


@pytest.mark.parametrize(
    "norm", [TimesOnePlusWeight(), nn.LayerNorm(16), nn.LayerNorm(16, bias=False), nn.Linear(4, 4)]
)
def test_another_norm_is_not_recognised(norm):
    assert as_norm(norm) is None


@runs_here
def test_forwards_are_replaced_only_inside_and_only_where_nobody_has_done_so():
    layer = base_model(tiny_model("llama", dtype=torch.bfloat16)).model.layers[0]
    fused, mlp = find_fused(layer), layer.mlp
    with fused_forwards(fused):
        assert all("forward" in vars(f.module) for f in fused)
    assert not any("forward" in vars(f.module) for f in fused)
    mine = mlp.forward = lambda x: x
    with fused_forwards(fused):
        assert mlp.forward is mine
    assert mlp.forward is mine
    assert all(f.module is not mlp for f in find_fused(layer))


def gradients(model, ids):
    model.zero_grad()
    training_loss(model, ids).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def distance(got, truth):
    """Over all parameters, in units of the truth."""
    return (
        sum((got[n] - truth[n]).square().sum() for n in truth) / sum(g.square().sum() for g in truth.values())
    ).sqrt()


@runs_here
@pytest.mark.parametrize("dtype", BOTH)
def test_gradients_are_as_near_to_float64_as_without(monkeypatch, dtype):
    calls = []
    for name in ("rms_norm_backward", "swiglu_backward"):
        kernel = getattr(cpu_elementwise, name)
        monkeypatch.setattr(cpu_elementwise, name, lambda *a, n=name, k=kernel, **b: (calls.append(n), k(*a, **b))[1])
    ids = torch.randint(3, VOCABULARY, (2, 61), generator=torch.Generator().manual_seed(1))
    model = tiny_model("qwen3", dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    enable_sweep(model, tile=16)
    sweeper = sweeper_of(model)
    fused, found = gradients(model, ids), sweeper.fused
    assert {len(modules) for modules in found.values()} == {5}
    sweeper.fused = {}
    called = len(calls)
    plain = gradients(model, ids)
    assert len(calls) == called
    truth = gradients(model.double(), ids)
    assert fused.keys() == plain.keys() == truth.keys()
    # Layer 1: four tiles, each with five modules; in layer 0 nothing before the projections needs a gradient.
    assert (calls.count("swiglu_backward"), calls.count("rms_norm_backward")) == (8, 28)
    # The same values are rounded at the same places; where one falls otherwise, it is another draw of the same noise.
    assert distance(fused, truth) <= NOISE[dtype] * distance(plain, truth)


@runs_here
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_norms_that_train_are_as_near_to_float64_as_without(family, dtype):
    ids = torch.randint(3, VOCABULARY, (2, 61), generator=torch.Generator().manual_seed(1))
    model = tiny_model(family, dtype=dtype).train()
    names = {name for name, p in model.named_parameters() if "norm" in name and ".layers." in name}
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    enable_sweep(model, tile=16)
    fused = gradients(model, ids)
    sweeper_of(model).fused = {}
    plain = gradients(model, ids)
    truth = gradients(model.double(), ids)
    assert fused.keys() == plain.keys() == truth.keys() == names
    assert any(not torch.equal(fused[n], plain[n]) for n in names)  # other sums: both paths ran
    # torch rounds each product of the weight's gradient to bf16 before it adds them, the kernels do not.
    assert distance(fused, truth) <= NOISE[dtype] * distance(plain, truth)
