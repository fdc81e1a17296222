"""Attention outputs kept for backward: the same bits, no more bytes than allowed, none that outlive their graph."""

import gc
import weakref

import pytest
import torch
from tests.tiny_models import VOCABULARY, tiny_model

from longfit.engine.loss.training_loss import training_loss
from longfit.engine.sweep import tile_pass
from longfit.engine.sweep.install import enable_sweep
from longfit.engine.sweep.saved_attention import SavedAttentionBudget
from longfit.engine.sweep.sweeper import sweeper_of

BATCH, TOKENS, TILE = 2, 40, 7
NUM_TILES = 6


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (BATCH, TOKENS))


@pytest.fixture
def attended(monkeypatch):
    """Bytes of the result of each call of tile attention."""
    sizes = []
    right = tile_pass.tile_forward

    def spy(*args, **options):
        out, lse = right(*args, **options)
        sizes.append(out.untyped_storage().nbytes() + lse.untyped_storage().nbytes())
        return out, lse

    monkeypatch.setattr(tile_pass, "tile_forward", spy)
    return sizes


def gradients(model, ids, saved_attention_bytes, attended=None):
    enable_sweep(model, tile=TILE, saved_attention_bytes=saved_attention_bytes)
    if attended is not None:
        attended.clear()  # what the probe of enable_sweep attended
    model.zero_grad()
    training_loss(model, ids).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_what_is_kept_is_not_computed_again_and_changes_no_bit(ids, attended):
    model = tiny_model("llama", dtype=torch.float32)
    recomputed = gradients(model, ids, 0, attended)
    layer_tiles = 2 * NUM_TILES
    assert len(attended) == 2 * layer_tiles
    one_layer = sum(attended[:NUM_TILES])
    for allowed, num_recomputed in ((1 << 30, 0), (one_layer, NUM_TILES), (one_layer - 1, NUM_TILES + 1)):
        saved = gradients(model, ids, allowed, attended)
        assert len(attended) == layer_tiles + num_recomputed
        assert all(torch.equal(saved[name], gradient) for name, gradient in recomputed.items())
        assert sweeper_of(model).saved_attention.left == allowed


def test_a_dropped_graph_gives_its_bytes_back(ids):
    model = tiny_model("llama", dtype=torch.float32)
    enable_sweep(model, tile=TILE, saved_attention_bytes=1 << 20)
    budget = sweeper_of(model).saved_attention
    loss = training_loss(model, ids)
    assert budget.left < 1 << 20
    del loss
    gc.collect()
    assert budget.left == 1 << 20


def test_evaluation_keeps_nothing(ids):
    model = tiny_model("llama", dtype=torch.float32)
    enable_sweep(model, tile=TILE, saved_attention_bytes=1 << 20)
    with torch.no_grad():
        training_loss(model, ids)
    assert sweeper_of(model).saved_attention.left == 1 << 20


def attention(num_tokens):
    """Output and log-sum-exp of a tile as the engine gets them."""
    return torch.randn(BATCH, num_tokens, 3, 8).transpose(1, 2), torch.randn(BATCH, 3, num_tokens)


def test_a_tile_is_handed_over_once_with_its_bits_and_its_order_of_axes():
    budget = SavedAttentionBudget(1 << 20)
    saved = budget.open(NUM_TILES)
    tiles = {index: attention(TILE if index < NUM_TILES - 1 else 5) for index in range(NUM_TILES)}
    for index, (out, lse) in tiles.items():
        saved.put(index, out, lse)
    assert saved.num_bytes == sum(out.nbytes + lse.nbytes for out, lse in tiles.values())
    for index in reversed(range(NUM_TILES)):
        taken = saved.take(index)
        assert all(map(torch.equal, taken, tiles[index]))
        assert [tensor.stride() for tensor in taken] == [tensor.stride() for tensor in tiles[index]]
        assert saved.take(index) is None
    assert budget.left == budget.num_bytes


def test_tiles_that_wait_are_copies_in_one_piece_of_memory():
    """A small object that stays after each tile's large ones leaves a hole that the next tile's do not fit into."""
    saved = SavedAttentionBudget(1 << 20).open(NUM_TILES)
    for index in range(NUM_TILES):
        out, lse = attention(TILE)
        given = [weakref.ref(out), weakref.ref(lse)]
        saved.put(index, out, lse)
        del out, lse
        assert [ref() for ref in given] == [None, None]
    taken = [saved.take(index) for index in range(NUM_TILES)]
    for tensors in zip(*taken, strict=True):
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_a_short_tile_may_be_the_only_one_that_fits():
    (long_out, long_lse), (out, lse) = attention(TILE), attention(2)
    saved = SavedAttentionBudget(out.nbytes + lse.nbytes).open(2)
    saved.put(0, long_out, long_lse)
    saved.put(1, out, lse)
    assert saved.take(0) is None
    assert all(map(torch.equal, saved.take(1), (out, lse)))


def test_a_budget_that_grows_under_a_layer_does_not_burst_its_room():
    """The graph of an earlier loss may go while a layer is in its forward pass."""
    tile = attention(TILE)
    num_bytes = sum(tensor.nbytes for tensor in tile)
    budget = SavedAttentionBudget(3 * num_bytes)
    earlier, saved = budget.open(NUM_TILES), budget.open(NUM_TILES)
    earlier.put(0, *tile)
    saved.put(0, *tile)
    del earlier
    for index in range(1, NUM_TILES):
        saved.put(index, *tile)
    assert saved.num_bytes == 2 * num_bytes
    assert [index for index in range(NUM_TILES) if saved.take(index) is not None] == [0, 1]
    assert budget.left == budget.num_bytes


def test_an_empty_batch_is_kept_as_any_other():
    saved = SavedAttentionBudget(1 << 10).open(1)
    saved.put(0, torch.empty(0, 3, 4, 8), torch.empty(0, 3, 4))
    assert [tuple(tensor.shape) for tensor in saved.take(0)] == [(0, 3, 4, 8), (0, 3, 4)]


def test_a_negative_number_of_bytes_is_refused():
    with pytest.raises(ValueError, match="saved_attention_bytes -1: must be at least 0"):
        enable_sweep(tiny_model("llama"), saved_attention_bytes=-1)
