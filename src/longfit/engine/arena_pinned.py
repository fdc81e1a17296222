"""Layer inputs in the pinned host memory of a CUDA device, copied on a stream of their own.

What is hard about it: torch's own pinned memory rounds up to a power of two, twice what is needed at worst; a copy that
runs beside the computation must not read a tile that has been overwritten, nor be read before it has arrived. So slabs
are mapped and registered here in their exact size and used again by later layers and steps, and every order between the
two streams is an event. The host never waits.
"""

import mmap
from collections import defaultdict

import torch
from torch import Tensor

from longfit.errors import PlanError


class PinnedArena:
    """Keeps tiles in pinned slabs, one per layer."""

    aliases = False

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device)
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def open(self, num_tiles: int) -> "_PinnedStay":
        return _PinnedStay(self, num_tiles)

    def take(self, num_bytes: int) -> Tensor:
        """Take a pinned uint8 slab of exactly this size."""
        return self._free[num_bytes].pop() if self._free[num_bytes] else _pinned_slab(num_bytes)

    def give(self, slab: Tensor) -> None:
        """Give a slab back; copies out of it may still be running, later ones are ordered behind them."""
        self._free[slab.numel()].append(slab)


def _pinned_slab(num_bytes: int) -> Tensor:
    """Host memory registered with CUDA: whole pages, page-aligned, no rounding to a power of two."""
    memory = mmap.mmap(-1, -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    slab = torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes)
    status = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), len(memory), 0)
    if int(status) != 0:
        raise PlanError(
            f"{num_bytes / 2**30:.2f} GiB of host memory cannot be pinned (CUDA error {int(status)}); raise the limit"
            " of locked memory (ulimit -l), shorten the context, or keep layer inputs in a file"
        )
    return slab


class _PinnedStay:
    def __init__(self, arena: PinnedArena, num_tiles: int) -> None:
        self._arena, self._num_tiles = arena, num_tiles
        self._slab: Tensor | None = None
        self._slot_bytes = 0
        self._places: dict[int, Tensor] = {}  # views of the slab, in the tile's shape
        self._copied: dict[int, torch.cuda.Event] = {}
        self._fetched: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def put(self, index: int, tile: Tensor) -> None:
        if self._slab is None:  # the first tile is the largest
            self._slot_bytes = tile.numel() * tile.element_size()
            self._slab = self._arena.take(self._slot_bytes * self._num_tiles)
        offset, size = index * self._slot_bytes, tile.numel() * tile.element_size()
        place = self._slab[offset : offset + size].view(tile.dtype).view(tile.shape)
        stream = self._arena.stream
        stream.wait_stream(torch.cuda.current_stream(tile.device))
        with torch.cuda.stream(stream):
            place.copy_(tile, non_blocking=True)
        tile.record_stream(stream)
        self._places[index], self._copied[index] = place, stream.record_event()

    def settle(self, index: int) -> None:
        torch.cuda.current_stream(self._arena.device).wait_event(self._copied[index])

    def prefetch(self, index: int) -> None:
        if index in self._fetched or index not in self._places:
            return
        stream = self._arena.stream  # copies of one stream keep their order: this one runs after the tile was put
        with torch.cuda.stream(stream):
            tile = self._places[index].to(self._arena.device, non_blocking=True)
        self._fetched[index] = (tile, stream.record_event())

    def get(self, index: int) -> Tensor:
        self.prefetch(index)
        tile, ready = self._fetched.pop(index)
        stream = torch.cuda.current_stream(self._arena.device)
        stream.wait_event(ready)
        tile.record_stream(stream)
        return tile

    def close(self) -> None:
        if self._slab is not None:
            self._arena.give(self._slab)
        self._slab = None
        self._places.clear()
        self._fetched.clear()

    def __del__(self) -> None:
        self.close()
