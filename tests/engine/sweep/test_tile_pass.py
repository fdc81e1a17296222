"""The pass over a layer's tiles: which keys each tile sees, and when gradients of keys are finished."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longfit.attention.spec import AttentionSpec
from longfit.attention.visibility import Schedule, build_schedule, document_starts
from longfit.engine.sweep.shared_sequence import KeysProjected, Stretch
from longfit.engine.sweep.tile_pass import BackwardPass, ForwardPass, SweptTile
from longfit.errors import ModelError

HEADS, KEY_HEADS, DIM = 6, 2, 4


def make_schedule(num_tokens: int, **pattern: int) -> Schedule:
    return build_schedule(HEADS, document_starts(1, num_tokens), **pattern)


def attend(tile: SweptTile, qkv: list[Tensor], **options: Any) -> Tensor:
    start, end = tile.span
    return tile.attend(*(part[:, :, start:end] for part in qkv), AttentionSpec(scaling=0.5, **options))


def random_qkv(num_tokens: int) -> list[Tensor]:
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    return [torch.randn(1, h, num_tokens, DIM, dtype=torch.float64, requires_grad=True) for h in heads]


@pytest.mark.parametrize("pattern", [{}, {"sliding_window": 3}, {"group_size": 4}], ids=["all", "w3", "g4"])
def test_forward_and_backward_are_attention_and_its_gradient(pattern: dict[str, int]) -> None:
    num_tokens, tile = 13, 3
    qkv, wanted = random_qkv(num_tokens), torch.randn(1, num_tokens, HEADS, DIM, dtype=torch.float64)
    first = make_schedule(num_tokens, **pattern).first_key.repeat_interleave(
        HEADS // (2 if "group_size" in pattern else 1), 0
    )
    key = torch.arange(num_tokens)
    seen = (key >= first[:, 0, :, None]) & (key <= key[:, None])  # [H, T, T]
    query, keys, values = qkv[0], *(part.repeat_interleave(HEADS // KEY_HEADS, 1) for part in qkv[1:])
    scores = (0.5 * query @ keys.transpose(2, 3)).masked_fill(~seen, float("-inf"))
    dense = (scores.softmax(-1) @ values).transpose(1, 2)
    expected = torch.autograd.grad(dense, qkv, wanted)

    stretch = Stretch(0, num_tokens)
    forward = ForwardPass(stretch, tile)
    for index in range(5):
        start, end = forward.span(index)
        out = attend(forward.tile(index), qkv, **pattern)
        # float64: a softmax over at most 13 scores and a sum of as many products, some tens of roundings of 1e-16
        torch.testing.assert_close(out, dense[:, start:end], rtol=1e-12, atol=1e-13)
    assert forward.visible is not None
    back = BackwardPass(stretch, tile, forward.visible)
    for index in reversed(range(5)):
        for new in back.needed(index):
            with pytest.raises(KeysProjected):
                attend(back.keys_tile(new), qkv, **pattern)
        start, end = forward.span(index)
        found = torch.autograd.grad(attend(back.gradient_tile(index), qkv, **pattern), qkv, wanted[:, start:end])
        for part, whole in zip(found, expected, strict=True):  # of k, v too: finished, not partial
            torch.testing.assert_close(part[:, :, start:end], whole[:, :, start:end], rtol=1e-11, atol=1e-12)


def test_layers_that_attend_twice_or_with_tokens_of_their_own_are_refused() -> None:
    forward, qkv = ForwardPass(Stretch(0, 6), 3), random_qkv(6)
    tile = forward.tile(0)
    attend(tile, qkv)
    with pytest.raises(ModelError, match="attends more than once"):
        attend(tile, qkv)
    with pytest.raises(ModelError, match="a tile of 3 tokens attends with 4 queries and 3 keys"):
        forward.tile(1).attend(qkv[0][:, :, :4], qkv[1][:, :, 3:], qkv[2][:, :, 3:], AttentionSpec(scaling=1.0))
