"""A call of a layer on one tile: what is given per token is cut, what describes the sequence is passed whole."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longfit.engine.sweep.layer_call import layer_call
from longfit.engine.sweep.shared_sequence import Stretch
from longfit.engine.sweep.tile_pass import ForwardPass, SweptTile
from longfit.errors import ModelError

T = 7


class Layer(nn.Module):
    """Remembers what it was called with; attends unless told not to."""

    def __init__(self, *, attends: bool = True) -> None:
        super().__init__()
        self.attends = attends

    def forward(self, hidden: Tensor, *args: Any, sweep: SweptTile, **keywords: Any) -> tuple[Tensor, str]:
        self.args, self.keywords = args, keywords
        sweep.attended = self.attends
        return hidden + 1, "weights"


def tile_at(index: int, tile: int = 3) -> SweptTile:
    return ForwardPass(Stretch(0, T), tile).tile(index)


def call(layer: Layer, *args: Any, **keywords: Any) -> Any:
    return layer_call(partial(Layer.forward, layer, **keywords), args)[0]


def test_hidden_states_are_found_by_place_or_by_name() -> None:
    hidden = torch.randn(2, T, 5)
    for args, keywords in (((hidden,), {}), ((), {"hidden_states": hidden})):
        found, first = layer_call(partial(Layer.forward, Layer(), flag=1, **keywords), args)
        assert first is hidden
        assert (found.args, found.keywords, found.num_tokens) == ((), {"flag": 1}, T)


@pytest.mark.parametrize(("index", "start", "end"), [(0, 0, 3), (2, 6, 7)])  # the last tile is short
def test_a_tile_gets_its_tokens_and_the_whole_mask(index: int, start: int, end: int) -> None:
    layer, hidden, mask = Layer(), torch.randn(2, T, 5), torch.ones(2, T)
    rotary = tuple(torch.randn(1, T, 4) for _ in range(2))
    positions, by_token, steps = torch.arange(T)[None], torch.randn(T, 3), torch.randn(2, 4)
    found = call(
        layer, hidden, by_token, attention_mask=mask, position_embeddings=rotary, inner={"p": [positions]}, s=steps, n=T
    )
    out = found.run(hidden[:, start:end], tile_at(index))
    assert torch.equal(out, hidden[:, start:end] + 1)  # the first of what the layer returns
    given = layer.keywords
    assert given["attention_mask"] is mask
    assert given["s"] is steps
    assert given["n"] == T
    for whole, part in zip(rotary, given["position_embeddings"], strict=True):
        assert torch.equal(part, whole[:, start:end])
    assert given["inner"]["p"][0].tolist() == [list(range(start, end))]
    assert torch.equal(layer.args[0], by_token[start:end])


def test_the_axis_of_tokens_is_the_second_where_two_would_do() -> None:
    layer, hidden, square = Layer(), torch.randn(1, T, 5), torch.arange(T * T).view(1, T, T)
    call(layer, hidden, x=square).run(hidden[:, :3], tile_at(0))
    assert torch.equal(layer.keywords["x"], square[:, :3])
    with pytest.raises(ModelError, match=r"shape \(1, 1, 7, 7\) for 7 tokens, which cannot be cut"):
        call(layer, hidden, x=square[None]).run(hidden[:, :3], tile_at(0))
    call(layer, hidden, x=square[None]).run(hidden, tile_at(0, tile=T))  # one tile needs no cut
    assert layer.keywords["x"].shape == (1, 1, T, T)


def test_a_layer_that_did_not_attend_is_named() -> None:
    hidden = torch.randn(1, T, 5)
    with pytest.raises(ModelError, match="Layer did not attend through longfit's attention"):
        call(Layer(attends=False), hidden).run(hidden[:, :3], tile_at(0))


def test_gradients_besides_the_hidden_states_are_seen_wherever_they_hide() -> None:
    hidden, other = torch.randn(1, T, 5, requires_grad=True), torch.randn(1, T, requires_grad=True)
    assert not call(Layer(), hidden, x=other.detach()).carries_gradient
    assert call(Layer(), hidden, other).carries_gradient
    assert call(Layer(), hidden, x={"y": [(other,)]}).carries_gradient
