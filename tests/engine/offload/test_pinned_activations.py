"""The pinned arena's books: which slab, which buffer, what is held until when. On a card: ``test_arena.py``.

Streams are stood in for by ones whose work is over at once, so orders between them are not tested here; what is tested
is that no buffer is written while a tile in it may still be used.
"""

import random
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from longfit.engine.offload import pinned_activations as arena_pinned
from longfit.engine.offload.pinned_activations import NUM_BUFFERS, PinnedArena


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
def arena(monkeypatch: pytest.MonkeyPatch) -> Iterator[PinnedArena]:
    current = Stream()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: current)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(
            arena_pinned.PinnedMemory, "slab", lambda self, num_bytes: torch.full((num_bytes,), 255, dtype=torch.uint8)
        )
        yield PinnedArena("cpu")


def put_all(arena: object, tiles: list[Tensor]) -> object:
    stay = arena.open(len(tiles))
    for index, tile in enumerate(tiles):
        stay.put(index, tile)
        stay.settle(index)
    return stay


def tiles(count: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(2, 5 if index < count - 1 else 3, 6).to(dtype) for index in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_a_tile_is_whole_until_the_next_is_got(arena: PinnedArena, seed: int) -> None:
    expected, choose = tiles(7), random.Random(seed)
    stay = put_all(arena, expected)
    for _ in range(60):
        index = choose.randrange(7)
        got = stay.get(index)
        for _ in range(choose.randrange(6)):  # more than there are buffers, and some for tiles that never come
            stay.prefetch(choose.randrange(9))
        assert torch.equal(got, expected[index])
    assert len(arena._buffers) == NUM_BUFFERS


def test_the_order_of_the_sweep_fetches_every_tile_once(arena: PinnedArena, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    fetch = arena_pinned._PinnedStay._fetch

    def counting(self: object, index: int) -> bool:
        done = fetch(self, index)
        fetched.extend([index] * done)
        return done

    monkeypatch.setattr(arena_pinned._PinnedStay, "_fetch", counting)
    expected = tiles(6)
    stay = put_all(arena, expected)
    for earlier in range(5):  # keys of all earlier tiles, then gradients last to first
        stay.prefetch(earlier + 1)
        assert torch.equal(stay.get(earlier), expected[earlier])
    for index in reversed(range(6)):
        stay.prefetch(max(index - 1, 0))
        assert torch.equal(stay.get(index), expected[index])
    assert fetched == [1, 0, 2, 3, 4, 5, 4, 3, 2, 1, 0]


def test_slabs_and_buffers_are_used_again(arena: PinnedArena) -> None:
    for _step in range(3):
        stays = [put_all(arena, tiles(4)) for _layer in range(2)]
        for stay in reversed(stays):
            for index in reversed(range(4)):
                stay.get(index)
            stay.close()
    (slabs,) = arena._free.values()
    assert len(slabs) == 8
    assert not any(buffer.busy for buffer in arena._buffers)
    wide = put_all(arena, [torch.randn(2, 50, 6)])
    assert wide.get(0).shape == (2, 50, 6)
    assert {buffer.data.numel() for buffer in arena._buffers} == {2 * 50 * 6 * 4}


def test_a_tile_lives_until_it_is_settled(arena: PinnedArena) -> None:
    stay = arena.open(2)
    stay.put(0, torch.ones(1, 2, 3))
    assert 0 in stay._leaving
    stay.close()  # a forward pass that broke off
    assert not stay._leaving


def test_layers_taken_back_at_the_same_time_are_refused(arena: PinnedArena) -> None:
    first, second = put_all(arena, tiles(6)), put_all(arena, tiles(6))
    first.get(0)
    for index in range(1, 6):
        first.prefetch(index)
    with pytest.raises(RuntimeError, match="one layer at a time"):
        second.get(0)
