"""The pinned offload's books: which slab, which buffer, what is held until when. On a card: ``test_offload.py``.

Streams are stood in for by ones whose work is over at once, so orders between them are not tested here; what is tested
is that no buffer is written while a tile in it may still be used.
"""

import random
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from longfit.engine.offload import pinned_activations
from longfit.engine.offload.pinned_activations import NUM_BUFFERS, PinnedActivations


class Stream:
    """All work is over at once."""

    def __init__(self, device: object = None) -> None:
        self.waits = 0

    def wait_stream(self, other: object) -> None:
        self.waits += 1

    def wait_event(self, event: object) -> None:
        assert event is not None
        self.waits += 1

    def record_event(self) -> object:
        return object()


@pytest.fixture
def offload(monkeypatch: pytest.MonkeyPatch) -> Iterator[PinnedActivations]:
    current = Stream()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: current)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(
            pinned_activations.PinnedMemory,
            "slab",
            lambda self, num_bytes: torch.full((num_bytes,), 255, dtype=torch.uint8),
        )
        yield PinnedActivations("cpu")


def put_all(offload: object, tiles: list[Tensor]) -> object:
    saved_input = offload.open(len(tiles))
    for index, tile in enumerate(tiles):
        saved_input.put(index, tile)
        saved_input.settle(index)
    return saved_input


def tiles(count: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(2, 5 if index < count - 1 else 3, 6).to(dtype) for index in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_a_tile_is_whole_until_the_next_is_got(offload: PinnedActivations, seed: int) -> None:
    expected, choose = tiles(7), random.Random(seed)
    saved_input = put_all(offload, expected)
    for _ in range(60):
        index = choose.randrange(7)
        got = saved_input.get(index)
        for _ in range(choose.randrange(6)):  # more than there are buffers, and some for tiles that never come
            saved_input.prefetch(choose.randrange(9))
        assert torch.equal(got, expected[index])
    assert len(offload._buffers) == NUM_BUFFERS


def test_the_order_of_the_sweep_fetches_every_tile_once(
    offload: PinnedActivations, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []
    fetch = pinned_activations._PinnedInput._fetch

    def counting(self: object, index: int) -> bool:
        done = fetch(self, index)
        fetched.extend([index] * done)
        return done

    monkeypatch.setattr(pinned_activations._PinnedInput, "_fetch", counting)
    expected = tiles(6)
    saved_input = put_all(offload, expected)
    for earlier in range(5):  # keys of all earlier tiles, then gradients last to first
        saved_input.prefetch(earlier + 1)
        assert torch.equal(saved_input.get(earlier), expected[earlier])
    for index in reversed(range(6)):
        saved_input.prefetch(max(index - 1, 0))
        assert torch.equal(saved_input.get(index), expected[index])
    assert fetched == [1, 0, 2, 3, 4, 5, 4, 3, 2, 1, 0]


def test_slabs_and_buffers_are_used_again(offload: PinnedActivations) -> None:
    for _step in range(3):
        saved_inputs = [put_all(offload, tiles(4)) for _layer in range(2)]
        for saved_input in reversed(saved_inputs):
            for index in reversed(range(4)):
                saved_input.get(index)
            saved_input.close()
    (slabs,) = offload._free.values()
    assert len(slabs) == 8
    assert not any(buffer.busy for buffer in offload._buffers)
    wide = put_all(offload, [torch.randn(2, 50, 6)])
    assert wide.get(0).shape == (2, 50, 6)
    assert {buffer.data.numel() for buffer in offload._buffers} == {2 * 50 * 6 * 4}


def test_a_tile_lives_until_it_is_settled(offload: PinnedActivations) -> None:
    saved_input = offload.open(2)
    saved_input.put(0, torch.ones(1, 2, 3))
    assert 0 in saved_input._leaving
    saved_input.close()  # a forward pass that broke off
    assert not saved_input._leaving


def test_layers_taken_back_at_the_same_time_are_refused(offload: PinnedActivations) -> None:
    first, second = put_all(offload, tiles(6)), put_all(offload, tiles(6))
    first.get(0)
    for index in range(1, 6):
        first.prefetch(index)
    with pytest.raises(RuntimeError, match="one layer at a time"):
        second.get(0)
