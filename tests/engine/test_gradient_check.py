"""The public gradient check: green on a right engine, red on a wrong one, and it leaves the model alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.exact_norms import exact_norms
from tests.families.tiny_family import tiny_family
from tests.tiny_models import VOCABULARY, tiny_model

from longfit.attention import hf_attention
from longfit.engine.gradient_check import check_gradients
from longfit.engine.sweep import tile_pass
from longfit.engine.sweep.install import enable_sweep
from longfit.engine.sweep.sweeper import sweeper_of


def adapted(dropout=0.0):
    # Qwen3 with torch's attention: the "eager" one of transformers rounds its softmax to float32.
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(
        exact_norms(tiny_model("qwen3", attn_implementation="sdpa")), config, autocast_adapter_dtype=False
    )


def test_a_right_engine_is_green_and_the_model_is_left_as_it_was():
    model, ids = adapted(dropout=0.5), torch.randint(3, VOCABULARY, (2, 25))
    model.eval()
    before = {name: module.training for name, module in model.named_modules()}
    report = check_gradients(model, {"input_ids": ids, "position_ids": (torch.arange(25) % 14)[None].expand(2, -1)})
    assert report.ok
    assert report.worst[1] < 1e-10
    assert report.sweep.tile == 8
    assert report.errors.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name: module.training for name, module in model.named_modules()} == before
    assert sweeper_of(model) is None
    assert model.get_base_model().config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in model.parameters())


def test_an_installed_sweep_stays_installed():
    model, ids = adapted(), torch.randint(3, VOCABULARY, (1, 20))
    enable_sweep(model, tile=5)
    installed = sweeper_of(model)
    assert check_gradients(model, ids, tile=3).ok
    assert sweeper_of(model) is installed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gradient_that_is_wrong_by_1e_4_is_red(monkeypatch, dtype):
    right = tile_pass.tile_backward

    def wrong(*args, grad_k, grad_v):
        grad_query = right(*args, grad_k=grad_k, grad_v=grad_v)
        grad_v *= 1.0 + 1e-4
        return grad_query

    model, ids = adapted().to(dtype), torch.randint(3, VOCABULARY, (1, 20))
    assert check_gradients(model, ids).ok
    monkeypatch.setattr(tile_pass, "tile_backward", wrong)
    report = check_gradients(model, ids)
    assert not report.ok
    assert "v_proj" in report.worst[0] or "layers.0" in report.worst[0]
    assert str(report).startswith("DIFFERENT")


def test_a_mask_that_longfit_loses_is_red(monkeypatch):
    """The plain side runs no attention of longfit's: a window that is dropped on the way there is seen."""
    family = tiny_family("phimoe", sliding_window=5)
    ids = family.tokens(1, 24)
    assert check_gradients(family.model, ids).ok
    monkeypatch.setattr(
        hf_attention, "read_mask", lambda *args, num_keys, **options: torch.zeros(1, 1, num_keys, 2).int()
    )
    report = check_gradients(family.model, ids)
    assert report.plain_attention == "sdpa"
    assert report.worst[1] > 1e-2
    assert not report.ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["glm4_moe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "dots1", "exaone_moe", "solar_open", "gpt_oss"]
)
def test_a_family_that_is_exact_is_green(kind, dtype):
    """Routers' gradients are tiny beside those of their layer, and their rounding is not."""
    family = tiny_family(kind, dtype=dtype)
    ids = family.tokens(1, 29)
    report = check_gradients(family.model, {"input_ids": ids, "position_ids": (torch.arange(29) % 12)[None]}, tile=8)
    assert not report.plain_attention.startswith("longfit")
    assert report.ok, str(report)
    if dtype is not torch.bfloat16:
        assert max(report.tolerances.values()) < 1e-4


def test_a_model_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="add adapters first"):
        check_gradients(tiny_model("llama").requires_grad_(False), torch.ones(1, 4, dtype=torch.long))
