"""Layer inputs in the pinned host memory of a CUDA device, copied on a stream of their own.

What is hard about it: a copy that runs beside the computation must not read a tile that has been overwritten or freed,
nor be read before it has arrived. Every order between the two streams is an event; the host never waits. And memory
that two streams share must not be given back to the allocator while one of them still uses it, or the peak would depend
on luck: tiles that come back go to a few buffers that are used again.
"""

from collections import defaultdict

import torch
from torch import Tensor

from longfit.engine.offload.activations import HostStates
from longfit.engine.offload.pinned_memory import PinnedMemory

NUM_BUFFERS = 4
"""Tiles on the device at once: one in use, and those asked for ahead: the sweep asks for two at most."""


class PinnedActivations:
    """Keeps tiles in pinned slabs, one per tile, so that layers and contexts of any length share them."""

    aliases = False
    place = "in pinned host memory"

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device)
        self._memory = PinnedMemory()
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._buffers: list[_Buffer] = []

    def open(self, num_tiles: int) -> "_PinnedInput":
        return _PinnedInput(self, num_tiles)

    def open_states(self, num_tiles: int) -> HostStates:
        return HostStates()

    def take(self, num_bytes: int) -> Tensor:
        """Take a pinned uint8 slab of exactly this size: one that was given back, or a new one."""
        return self._free[num_bytes].pop() if self._free[num_bytes] else self._memory.slab(num_bytes)

    def give(self, slab: Tensor) -> None:
        """Give a slab back; copies out of it may still be running, later ones are ordered behind them."""
        self._free[slab.numel()].append(slab)

    def free_buffer(self, num_bytes: int) -> "_Buffer | None":
        """Return a device buffer of at least so many bytes that holds nothing; None if all hold something."""
        if not self._buffers or self._buffers[0].data.numel() < num_bytes:
            # The allocator orders memory by the current stream: it must be through with what the other one did, and
            # the other one with what this one did.
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            self._buffers = [_Buffer(num_bytes, self.device) for _ in range(NUM_BUFFERS)]
            self.stream.wait_stream(current)
        return next((buffer for buffer in self._buffers if not buffer.busy), None)


class _Buffer:
    """Device memory for a tile that comes back."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.data = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.busy = False
        self.used: torch.cuda.Event | None = None  # when the last use of what it held is over

    def release(self, used: torch.cuda.Event) -> None:
        """Hold nothing any more, once this has happened."""
        self.busy, self.used = False, used


class _PinnedInput:
    def __init__(self, offload: PinnedActivations, num_tiles: int) -> None:
        self._offload = offload
        self._slab_bytes = 0
        self._slabs: list[Tensor] = []
        self._places: dict[int, Tensor] = {}  # views of the slabs, in the tiles' shapes
        self._leaving: dict[int, tuple[Tensor, torch.cuda.Event]] = {}  # tiles that are being copied, not yet settled
        self._coming: dict[int, tuple[_Buffer, torch.cuda.Event]] = {}  # in the order in which they were asked for
        self._in_use: _Buffer | None = None

    def put(self, index: int, tile: Tensor) -> None:
        self._slab_bytes = self._slab_bytes or tile.nbytes  # the first tile is the largest
        self._slabs.append(self._offload.take(self._slab_bytes))
        place = self._slabs[-1][: tile.nbytes].view(tile.dtype).view(tile.shape)
        stream = self._offload.stream
        stream.wait_stream(torch.cuda.current_stream(tile.device))
        with torch.cuda.stream(stream):
            place.copy_(tile, non_blocking=True)
        self._places[index] = place
        self._leaving[index] = tile, stream.record_event()  # held, so that its memory stays its own until it is settled

    def settle(self, index: int) -> None:
        _, copied = self._leaving.pop(index)
        torch.cuda.current_stream(self._offload.device).wait_event(copied)

    def prefetch(self, index: int) -> None:
        if index not in self._coming and index in self._places:
            self._fetch(index)

    def get(self, index: int) -> Tensor:
        """The tile, in a buffer that is used again: valid until the next one is got."""
        self._finish_use()
        while index not in self._coming and not self._fetch(index):
            if not self._coming:
                raise RuntimeError(
                    "pinned offload: other layers hold all device buffers; take back one layer at a time"
                )
            self._drop(next(iter(self._coming)))  # nobody came for it
        self._in_use, arrived = self._coming.pop(index)
        torch.cuda.current_stream(self._offload.device).wait_event(arrived)
        place = self._places[index]
        return self._in_use.data[: place.nbytes].view(place.dtype).view(place.shape)

    def _fetch(self, index: int) -> bool:
        """Begin to bring a tile back; False if every buffer holds another."""
        buffer = self._offload.free_buffer(self._slab_bytes)
        if buffer is None:
            return False
        place, stream = self._places[index], self._offload.stream  # copies of one stream keep their order: put is over
        if buffer.used is not None:
            stream.wait_event(buffer.used)
        with torch.cuda.stream(stream):
            buffer.data[: place.nbytes].copy_(place.flatten().view(torch.uint8), non_blocking=True)
        buffer.busy = True
        self._coming[index] = buffer, stream.record_event()
        return True

    def _drop(self, index: int) -> None:
        buffer, arrived = self._coming.pop(index)
        buffer.release(arrived)

    def _finish_use(self) -> None:
        if self._in_use is not None:
            self._in_use.release(torch.cuda.current_stream(self._offload.device).record_event())
        self._in_use = None

    def close(self) -> None:
        for index in list(self._leaving):  # a forward pass that broke off
            self.settle(index)
        self._finish_use()
        for index in list(self._coming):
            self._drop(index)
        while self._slabs:
            self._offload.give(self._slabs.pop())
        self._places.clear()

    def __del__(self) -> None:
        self.close()
