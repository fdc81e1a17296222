"""A layer's last product is left out of its recomputation where nothing reads it, and no bit of a gradient changes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny_models import VOCABULARY, tiny_model
from torch import nn

from longfit.engine.gradient_check import check_gradients
from longfit.engine.loss.training_loss import training_loss
from longfit.engine.sweep.install import enable_sweep
from longfit.engine.sweep.layer_call import LayerCall
from longfit.engine.sweep.unread_product import UnreadProducts
from longfit.errors import ModelError
from longfit.layers.linear4bit import Linear4bit
from longfit.layers.qlora import QLoRALinear
from longfit.model.adapters import register_layers

TILE, TOKENS = 7, 20


def quantized(family="llama", **config):
    """A tiny model on 4-bit layers with adapters that do something."""
    model = tiny_model(family, dtype=torch.float32, **config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            model.set_submodule(name, Linear4bit.from_linear(module))
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    register_layers(lora)
    return get_peft_model(model, lora)


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (1, TOKENS))


@pytest.fixture
def multiplied(monkeypatch):
    """Shapes of the base weights that are multiplied with, one entry a call of ``linear``."""
    calls = []
    product_of = Linear4bit.product.fget

    class Spy:
        def __init__(self, product):
            self._product = product

        def linear(self, x, weight, constants):
            calls.append(tuple(weight.shape))
            return self._product.linear(x, weight, constants)

        def grad_input(self, *args):
            return self._product.grad_input(*args)

    monkeypatch.setattr(Linear4bit, "product", property(lambda self: Spy(product_of(self))))
    return calls


def gradients(model, ids):
    model.zero_grad()
    training_loss(model, ids).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_it_is_left_out_from_the_second_tile_on_and_no_bit_changes(ids, multiplied, monkeypatch):
    model = quantized()
    enable_sweep(model, tile=TILE)
    multiplied.clear()
    with monkeypatch.context() as patch:
        patch.setattr(UnreadProducts, "learn", lambda *args: None)
        whole = gradients(model, ids)
    per_step = len(multiplied)
    gradients(model, ids)  # learns of each layer at its first tile
    multiplied.clear()
    left_out = gradients(model, ids)
    layers, tiles = 2, -(-TOKENS // TILE)
    assert per_step - len(multiplied) == layers * tiles
    assert whole.keys() == left_out.keys()
    assert all(torch.equal(whole[name], grad) for name, grad in left_out.items())


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3", "qwen3", "mixtral"])
def test_every_family_keeps_its_gradient(family, ids):
    model = quantized(family)
    gradients(model, ids)
    report = check_gradients(model, ids, tile=TILE)
    # float32 sums in another order, of a model whose gradients agree to rounding
    assert report.worst[1] < 1e-3


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_norm_behind_it_reads_it(family, ids, multiplied):
    model = quantized(family)
    gradients(model, ids)
    multiplied.clear()
    gradients(model, ids)
    first = list(multiplied)
    multiplied.clear()
    gradients(model, ids)
    assert multiplied == first
    assert len(first) == 2 * (7 + 7), "forward and all of it again, in one tile"


def test_a_hook_is_shown_what_the_layer_computes(ids):
    model, seen = quantized(), []
    gradients(model, ids)
    down = next(module for name, module in model.named_modules() if name.endswith("down_proj"))
    assert isinstance(down, QLoRALinear)
    down.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    gradients(model, ids)
    assert len(seen) == 2, "forward and once more"
    assert torch.equal(*seen)


def test_a_layer_whose_code_has_changed_is_refused(ids, monkeypatch):
    model = quantized()
    gradients(model, ids)
    right = LayerCall.run
    monkeypatch.setattr(LayerCall, "run", lambda *args: right(*args).sin())
    with pytest.raises(ModelError, match="call enable_sweep"):
        gradients(model, ids)
