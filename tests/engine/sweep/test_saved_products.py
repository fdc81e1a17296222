"""Products saved for backward: the same bits, no more bytes than allowed, none that outlive their graph."""

import gc

import pytest
import torch
from tests.engine.sweep.test_unread_product import gradients, ids, multiplied, quantized  # noqa: F401

from longfit.engine.loss.training_loss import training_loss
from longfit.engine.sweep.install import change_sweep, enable_sweep
from longfit.engine.sweep.sweeper import sweeper_of

TILE, NUM_TILES, LAYERS, SAVED = 7, 3, 2, 6
"""Tokens of a tile, tiles, layers, and linear layers of each whose product backward reads."""


def layer_bytes(tokens):
    """Llama's q, k, v, o, gate and up in float32; six heads of 8 on two, 80 inside."""
    return 4 * tokens * (48 + 16 + 16 + 48 + 80 + 80)


def test_what_is_saved_is_not_multiplied_again_and_changes_no_bit(ids, multiplied):  # noqa: F811
    model = quantized()
    enable_sweep(model, tile=TILE)
    gradients(model, ids)  # learns which product is not read
    multiplied.clear()
    recomputed, calls = gradients(model, ids), len(multiplied)
    tokens = ids.numel()
    for allowed, spared in (
        (1 << 30, LAYERS * NUM_TILES * SAVED),
        (layer_bytes(tokens), NUM_TILES * SAVED),
        (layer_bytes(TILE), SAVED),
        (4 * TILE * (16 + 16), 2),  # not q, but k and v of the first tile
    ):
        change_sweep(model, saved_products_bytes=allowed)
        multiplied.clear()
        saved = gradients(model, ids)
        assert calls - len(multiplied) == spared
        assert all(torch.equal(saved[name], gradient) for name, gradient in recomputed.items())
        assert sweeper_of(model).saved_products.left == allowed


def test_a_dropped_graph_gives_its_bytes_back(ids):  # noqa: F811
    model = quantized()
    enable_sweep(model, tile=TILE, saved_products_bytes=1 << 20)
    gradients(model, ids)
    loss = training_loss(model, ids)
    budget = sweeper_of(model).saved_products
    assert budget.left == (1 << 20) - LAYERS * layer_bytes(ids.numel())
    del loss
    gc.collect()
    assert budget.left == 1 << 20


def test_dropout_drops_the_same_elements(ids):  # noqa: F811
    model = quantized()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    enable_sweep(model, tile=TILE)
    results = []
    for allowed in (0, 0, 1 << 20):
        change_sweep(model, saved_products_bytes=allowed)
        torch.manual_seed(3)
        results.append(gradients(model, ids))
    assert all(torch.equal(results[1][name], gradient) for name, gradient in results[2].items())


def test_less_than_nothing_is_refused():
    with pytest.raises(ValueError, match="saved_products_bytes -1"):
        enable_sweep(quantized(), saved_products_bytes=-1)


def test_a_product_that_is_written_over_is_multiplied_again(ids, multiplied):  # noqa: F811
    model = quantized()
    for layer in model.base_model.model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, y: y.mul_(2.0))
    enable_sweep(model, tile=TILE)
    gradients(model, ids)
    multiplied.clear()
    recomputed, calls = gradients(model, ids), len(multiplied)
    change_sweep(model, saved_products_bytes=1 << 30)
    multiplied.clear()
    saved = gradients(model, ids)
    assert calls - len(multiplied) == LAYERS * NUM_TILES * (SAVED - 1)
    assert all(torch.equal(saved[name], gradient) for name, gradient in recomputed.items())
