"""The public gradient check: green on a right engine, red on a wrong one, and it leaves the model alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.exact_norms import exact_norms
from tests.tiny_models import VOCABULARY, tiny_model

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


def test_a_wrong_gradient_is_red(monkeypatch):
    right = tile_pass.tile_backward

    def wrong(*args, grad_k, grad_v):
        grad_query = right(*args, grad_k=grad_k, grad_v=grad_v)
        grad_k *= 1.0 + 1e-7
        return grad_query

    monkeypatch.setattr(tile_pass, "tile_backward", wrong)
    report = check_gradients(adapted(), torch.randint(3, VOCABULARY, (1, 20)))
    assert not report.ok
    assert "k_proj" in report.worst[0] or "layers.0" in report.worst[0]


def test_a_model_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="add adapters first"):
        check_gradients(tiny_model("llama").requires_grad_(False), torch.ones(1, 4, dtype=torch.long))
