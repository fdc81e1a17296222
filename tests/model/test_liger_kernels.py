"""Liger's kernels in swept layers: the gradients of the model's own torch operations, and the rest of its family kept.

The kernels run on a card, or on the CPU under Triton's interpreter.
"""

import copy
import importlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.exact_norms import exact_norms
from tests.tiny_models import VOCABULARY, tiny_model
from torch import Tensor, nn

from longfit.attention.hf_attention import attention_key
from longfit.engine.hf_model import base_model
from longfit.engine.loss.training_loss import training_loss
from longfit.engine.sweep.fused_modules import fused_rotary
from longfit.engine.sweep.install import enable_sweep
from longfit.errors import BackendError
from longfit.kernels import elementwise
from longfit.layers.linear4bit import Linear4bit
from longfit.model import liger_kernels
from longfit.model.adapters import add_adapters

FAMILIES = ("gemma2", "gemma3", "llama", "mistral", "phi3", "qwen2", "qwen3")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A card, or a CPU that passes for one."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is missing; it comes with the dev extra on Linux")
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("Triton compiles where there is a card, and interprets elsewhere")
    if request.param == "interpreter":
        _teach_interpreter(monkeypatch)
        monkeypatch.setattr(liger_kernels, "liger_unavailable", lambda device: None)
    return "cpu" if request.param == "interpreter" else "cuda"


def _teach_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Triton's interpreter what liger asks of a compiler: floats as fp32, two functions of CUDA's library."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    norms, geglu = (importlib.import_module(f"liger_kernel.ops.{name}") for name in ("rms_norm", "geglu"))
    monkeypatch.setattr(norms, "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


@pytest.fixture(autouse=True)
def _families_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the exchanged rotary embedding out of transformers again after each test."""
    for family in FAMILIES:
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)


def quantized(family: str, device: str = "cpu", *, train_norms: bool = True) -> Any:
    """A tiny QLoRA model in float32; its adapters do something, its epsilon shows."""
    model = tiny_model(family, dtype=torch.float32, rms_norm_eps=1e-2, num_heads=3, num_kv_heads=1)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Linear4bit.from_linear(child))
    model = add_adapters(model, rank=3, train_norms=train_norms)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.to(device)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def own_loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("family", "engine", "train_norms"),
    [*((family, "sweep", True) for family in FAMILIES), ("llama", "sweep", False), ("qwen3", "plain", True)],
)
def test_gradients_are_those_of_the_models_own_operations(
    card: str, family: str, engine: str, train_norms: bool
) -> None:
    """Against the truth in float64, liger's kernels err as the model's own float32 does.

    Both make the same products and sums in another order: as many roundings, with other signs. How far they carry is
    measured on the model itself, as the worst relative error of its own float32. Some gradients are eight numbers, and
    one random sum may well be several times another: ten times are allowed. A norm whose backward writes over a
    gradient that the residual still needs is wrong by 1.
    """
    ids = torch.randint(3, VOCABULARY, (2, 3), device=card)
    model = quantized(family, card, train_norms=train_norms)
    exact = exact_norms(copy.deepcopy(model).double())
    truth, own = gradients(exact, own_loss(exact, ids)), gradients(model, own_loss(model, ids))

    report = liger_kernels.fuse(model, kernels="liger")
    if engine == "sweep":
        enable_sweep(model, tile=2)
    else:
        base_model(model).set_attn_implementation(attention_key())
        base_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fast = gradients(model, training_loss(model, ids))

    changed = {name.removesuffix(".modules_to_save.default").rsplit(".", 1)[-1] for name in report.modules}
    norms = [name for name, _ in base_model(model).named_modules() if name.rsplit(".", 1)[-1].endswith("norm")]
    assert {name.rsplit(".", 1)[-1] for name in norms} <= changed
    assert sum(name.endswith(".mlp") for name in report.modules) == 2
    own_error = max(relative_error(own[name], value) for name, value in truth.items())
    assert own_error < 1e-4, "more than rounding"
    for name, value in truth.items():
        assert relative_error(fast[name], value) <= 10 * own_error, name


def test_the_family_is_as_it_was_when_liger_fails_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of liger may raise after it has exchanged some of the classes."""
    integration = importlib.import_module("transformers.integrations.liger")
    family = importlib.import_module("transformers.models.llama.modeling_llama")
    before = dict(vars(family))

    def fails(model: Any, config: Any) -> None:
        for name in ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb"):
            setattr(family, name, None)
        raise TypeError("unexpected keyword")

    monkeypatch.setattr(integration, "apply_liger_kernel", fails)
    monkeypatch.setattr(liger_kernels, "liger_unavailable", lambda device: None)
    monkeypatch.setattr(liger_kernels, "version", lambda name: "0")
    with pytest.raises(TypeError, match="unexpected keyword"):
        liger_kernels.fuse(quantized("llama"), kernels="liger")
    assert dict(vars(family)) == before


def test_the_rest_of_the_family_is_as_it_was(card: str) -> None:
    """Later models are built from transformers' classes; the rotary embedding is liger's only while a layer is
    swept."""
    model = quantized("llama", card)
    family = sys.modules[type(base_model(model)).__module__]
    before, seen = dict(vars(family)), []
    liger_kernels.fuse(model)
    liger_kernels.fuse(quantized("llama", card))
    assert dict(vars(family)) == before
    with fused_rotary(base_model(model)):
        seen.append(family.apply_rotary_pos_emb)
    assert seen[0] is not before["apply_rotary_pos_emb"]
    assert dict(vars(family)) == before


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("mixtral", {}, "not tested with liger-kernel for mixtral, only for gemma2, gemma3_text, llama, mistral"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu, liger-kernel computes silu"),
        ("llama", {"dtype": torch.float64}, "liger-kernel has no kernels for torch.float64"),
    ],
)
def test_what_liger_does_not_compute_is_left_to_the_model(
    monkeypatch: pytest.MonkeyPatch, family: str, settings: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(liger_kernels, "liger_unavailable", lambda device: None)
    model = tiny_model(family, **{"dtype": torch.float32, **settings})
    report = liger_kernels.fuse(model)
    assert reason in str(report)
    assert (report.kernels, report.modules) == (None, ())
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(BackendError, match=f"fused kernels 'liger': {reason}.*; use auto or none"):
        liger_kernels.fuse(model, kernels="liger")


def test_bfloat16_on_a_card_without_it_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    config = tiny_model("llama", dtype=torch.float32).config
    for dtype, problem in ((torch.bfloat16, "liger-kernel has no kernels for torch.bfloat16 here"), (torch.half, None)):
        base = SimpleNamespace(config=config, dtype=dtype, device=torch.device("cuda"))
        assert liger_kernels.not_known(base) == problem


def test_without_a_card_or_the_package_the_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    assert str(liger_kernels.fuse(model, kernels="none")) == "norms, rotary, SwiGLU: the model's own (as asked)"
    monkeypatch.setattr(elementwise, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"liger-kernel is not installed: pip install 'longfit\[cuda\]'"):
        liger_kernels.fuse(model, kernels="liger")
    monkeypatch.setattr(elementwise, "find_spec", lambda name: name)
    assert "liger-kernel needs a card, this is cpu" in str(liger_kernels.fuse(model))
    with pytest.raises(BackendError, match="fused kernels 'triton': must be one of auto, none, liger"):
        liger_kernels.fuse(model, kernels="triton")


def test_a_version_that_changes_nothing_is_an_error(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", lambda model, kernels: None)
    with pytest.raises(BackendError, match="changed nothing in a llama model; install a newer one"):
        liger_kernels.fuse(quantized("llama", card))
