"""The pinned offload's books: which slab, which buffer, what is held until when. On a card: ``test_offload.py``.

Streams are stood in for by ones whose work is over at once, so orders between them are not tested here; what is tested
is that no buffer is written while a tile in it may still be used.
"""

import random
import weakref
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longfit.compat.torch import storage_identity
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


class Fetches(TorchDispatchMode):
    """Counts the copies out of slabs, by the number of the slab."""

    def __init__(self, slabs: list[Tensor]) -> None:
        super().__init__()
        self.slabs, self.fetched = slabs, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            source = storage_identity(args[1])
            self.fetched += [number for number, slab in enumerate(self.slabs) if storage_identity(slab) == source]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def slabs() -> list[Tensor]:
    """Every slab of pinned memory that is made."""
    return []


@pytest.fixture
def offload(monkeypatch: pytest.MonkeyPatch, slabs: list[Tensor]) -> Iterator[PinnedActivations]:
    current = Stream()

    def slab(memory: object, num_bytes: int) -> Tensor:
        slabs.append(torch.full((num_bytes,), 255, dtype=torch.uint8))
        return slabs[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: current)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(pinned_activations.PinnedMemory, "slab", slab)
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
    saved_input, buffers = put_all(offload, expected), set()
    for _ in range(60):
        index = choose.randrange(7)
        got = saved_input.get(index)
        for _ in range(choose.randrange(6)):  # more than there are buffers, and some for tiles that never come
            saved_input.prefetch(choose.randrange(9))
        assert torch.equal(got, expected[index])
        buffers.add(storage_identity(got))
    assert len(buffers) <= NUM_BUFFERS


def test_the_order_of_the_sweep_fetches_every_tile_once(offload: PinnedActivations, slabs: list[Tensor]) -> None:
    expected = tiles(6)
    saved_input = put_all(offload, expected)
    with Fetches(slabs) as fetches:
        for earlier in range(5):  # keys of all earlier tiles, then gradients last to first
            saved_input.prefetch(earlier + 1)
            assert torch.equal(saved_input.get(earlier), expected[earlier])
        for index in reversed(range(6)):
            saved_input.prefetch(max(index - 1, 0))
            assert torch.equal(saved_input.get(index), expected[index])
    assert fetches.fetched == [1, 0, 2, 3, 4, 5, 4, 3, 2, 1, 0]


def test_slabs_and_buffers_are_used_again(offload: PinnedActivations, slabs: list[Tensor]) -> None:
    for _step in range(3):
        saved_inputs = [put_all(offload, tiles(4)) for _layer in range(2)]
        for saved_input in reversed(saved_inputs):
            for index in reversed(range(4)):
                saved_input.get(index)
            saved_input.close()
    assert len(slabs) == 8
    wide = put_all(offload, [torch.randn(2, 50, 6)])
    assert wide.get(0).shape == (2, 50, 6)
    assert wide.get(0).untyped_storage().nbytes() == 2 * 50 * 6 * 4


def test_a_tile_lives_until_it_is_settled(offload: PinnedActivations) -> None:
    saved_input = offload.open(2)
    tile = torch.ones(1, 2, 3)
    lives = weakref.ref(tile)
    saved_input.put(0, tile)
    del tile
    assert lives() is not None
    saved_input.close()  # a forward pass that broke off
    assert lives() is None


def test_layers_taken_back_at_the_same_time_are_refused(offload: PinnedActivations) -> None:
    first, second = put_all(offload, tiles(6)), put_all(offload, tiles(6))
    first.get(0)
    for index in range(1, 6):
        first.prefetch(index)
    with pytest.raises(RuntimeError, match="one layer at a time"):
        second.get(0)
