"""Frozen weights in host memory or in a file, brought in one layer ahead and never written back.

A frozen layer is needed twice a step, and only while it is being swept: with long contexts, seconds pass until the next
one is. So the weights that do not train (4-bit rows, their constants, norms, the vocabulary matrices) may wait
elsewhere while the device holds two layers. Bringing the 112 MB of a 4-bit 8B layer takes 4.5 ms at 25 GB/s.

    accelerator     weights wait in pinned memory or in a file; two device slots of the largest unit's size; while one
                    is used, the other is filled on a stream of its own; events keep the order
    CPU             weights are the pages of a privately mapped file: they are read when touched, the next layer's are
                    asked for ahead, this layer's are let go after it, and nothing can ever reach the file

A *unit* is what comes and goes together: a layer, or a vocabulary matrix (both, where they are tied).

Not here: weights that train, and their optimiser state (``optim/paging.py``).
"""

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from longfit.engine.offload.pinned_memory import PinnedMemory

_ALIGNMENT = 64  # bytes; enough for every dtype and for vector loads


# ------------------------------------------------------------------------------------------------ units
@dataclass(eq=False)
class Unit:
    """Frozen tensors that come and go together.

    Attributes:
        modules: the layer, or the modules that share a vocabulary matrix.
        tensors: their frozen parameters and uint8 buffers; what changes is where their ``data`` is.
        start, end: the unit's bytes in the store, whole pages.
        waiting: the values in the store.
    """

    modules: tuple[nn.Module, ...]
    tensors: list[Tensor]
    start: int = 0
    end: int = 0
    waiting: tuple[Tensor, ...] = ()

    def views(self, storage: Tensor) -> tuple[Tensor, ...]:
        """The tensors as parts of a uint8 tensor, one behind the other, in their dtypes and shapes."""
        views, end = [], 0
        for tensor in self.tensors:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + tensor.nbytes
            views.append(storage[start:end].view(tensor.dtype).view(tensor.shape))
        return tuple(views)

    @property
    def num_bytes(self) -> int:
        """Bytes in a store or a slot, whole pages."""
        used = sum(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in self.tensors)
        return -(-used // mmap.PAGESIZE) * mmap.PAGESIZE

    def point_to(self, values: tuple[Tensor, ...]) -> None:
        """Let the tensors be these values from now on."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.data = value


def _units(base: Any, layers: set[nn.Module]) -> list[Unit]:
    """Embedding, layers, output matrix, in the order of a forward pass; modules that share a tensor share a unit."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    in_order = [(module,) for module in base.modules() if module in layers]
    shared = {id(p) for p in embedding.parameters()} & {id(p) for p in head.parameters()}
    ends = [((embedding, head),), ()] if shared else [((embedding,),), ((head,),)]
    units = [Unit(modules, _frozen(modules)) for modules in (*ends[0], *in_order, *ends[1])]
    units = [unit for unit in units if unit.tensors]
    end = 0
    for unit in units:
        unit.start, unit.end = end, end + unit.num_bytes
        end = unit.end
    return units


def _frozen(modules: tuple[nn.Module, ...]) -> list[Tensor]:
    """Frozen parameters, and the uint8 buffers that belong to 4-bit weights."""
    parameters = [p for module in modules for p in module.parameters() if not p.requires_grad]
    buffers = [b for module in modules for b in module.buffers() if b.dtype == torch.uint8 and b.numel()]
    return list({id(tensor): tensor for tensor in (*parameters, *buffers)}.values())


# ------------------------------------------------------------------------------------------------ where they wait
class _Store(Protocol):
    def will_need(self, unit: Unit) -> None:
        """Say that a unit is the next to be read."""
        ...

    def let_go(self, unit: Unit) -> None:
        """Say that a unit has been read."""
        ...


class _HostStore:
    """One slab of host memory, pinned for a CUDA device."""

    def __init__(self, units: list[Unit], *, pin: bool) -> None:
        self._memory = PinnedMemory() if pin else None
        if self._memory is not None:
            storage = self._memory.slab(units[-1].end)
        else:
            storage = torch.empty(units[-1].end, dtype=torch.uint8)
        for unit in units:
            unit.waiting = unit.views(storage[unit.start : unit.end])
            for place, tensor in zip(unit.waiting, unit.tensors, strict=True):
                place.copy_(tensor.detach())
            unit.point_to(unit.waiting)

    def will_need(self, unit: Unit) -> None:
        pass

    def let_go(self, unit: Unit) -> None:
        pass


class _FileStore:
    """A nameless file, mapped privately: pages come when touched and can be taken out of the process at any time."""

    def __init__(self, units: list[Unit], folder: str | os.PathLike[str]) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            for unit in units:
                page = torch.zeros(unit.num_bytes, dtype=torch.uint8)
                for place, tensor in zip(unit.views(page), unit.tensors, strict=True):
                    place.copy_(tensor.detach())
                file.write(page.numpy().data)
            file.flush()
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # outlives the open file
        storage = torch.frombuffer(self._mapping, dtype=torch.uint8)
        for unit in units:
            unit.waiting = unit.views(storage[unit.start : unit.end])
            unit.point_to(unit.waiting)

    def will_need(self, unit: Unit) -> None:
        self._mapping.madvise(mmap.MADV_WILLNEED, unit.start, unit.end - unit.start)

    def let_go(self, unit: Unit) -> None:
        self._mapping.madvise(mmap.MADV_DONTNEED, unit.start, unit.end - unit.start)


# ------------------------------------------------------------------------------------------------ where they are used
class _Slots:
    """Two device buffers, each for one unit at a time."""

    def __init__(self, units: list[Unit], device: torch.device) -> None:
        size = max(unit.num_bytes for unit in units)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._holds: list[Unit | None] = [None, None]
        self._ready: list[Any] = [None, None]  # events of the copy stream
        self._free: list[Any] = [None, None]  # events of the stream that computes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:  # the memory may have been used by kernels that still run
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def fetch(self, unit: Unit, *, beside: Unit | None = None) -> int:
        """Begin to fill a slot with a unit, not the slot that holds ``beside``; returns the slot."""
        if unit in self._holds:
            return self._holds.index(unit)
        slot = 1 if beside is not None and self._holds[0] is beside else 0
        self._holds[slot] = unit
        if self._stream is None:
            self._copy(unit, slot)
            return slot
        if self._free[slot] is not None:
            self._stream.wait_event(self._free[slot])
        with torch.cuda.stream(self._stream):
            self._copy(unit, slot)
        self._ready[slot] = self._stream.record_event()
        return slot

    def bring(self, unit: Unit) -> tuple[Tensor, ...]:
        """The unit's values on the device; the current stream waits for their copy."""
        slot = self.fetch(unit)
        if self._ready[slot] is not None:
            torch.cuda.current_stream(self._buffers[slot].device).wait_event(self._ready[slot])
        return unit.views(self._buffers[slot])

    def release(self, unit: Unit) -> None:
        """What is queued so far was the last use of a unit; its values stay until the slot is wanted."""
        slot = self._holds.index(unit)
        if self._stream is not None:
            self._free[slot] = torch.cuda.current_stream(self._buffers[slot].device).record_event()

    def _copy(self, unit: Unit, slot: int) -> None:
        for place, value in zip(unit.views(self._buffers[slot]), unit.waiting, strict=True):
            place.copy_(value, non_blocking=True)


@dataclass(frozen=True)
class StreamReport:
    """What was moved out.

    Attributes:
        num_bytes: frozen bytes that wait outside.
        largest_bytes: of the largest unit; an accelerator holds two slots of this size.
        place: "host memory", or the folder of the file.
    """

    num_bytes: int
    largest_bytes: int
    place: str


class WeightStream:
    """A model's frozen weights outside of it: the store, the slots, the order of units, and the embedding's hooks.

    Attributes:
        device: where units are used.
        report: what was moved.
    """

    def __init__(
        self,
        base: Any,
        layers: set[nn.Module],
        *,
        folder: str | os.PathLike[str] | None,
        slots_on: torch.device | None,
    ) -> None:
        """Move the weights out.

        Args:
            base: a transformers causal language model.
            layers: those of its layers that somebody will call :meth:`use` around.
            folder: where the file goes; None is host memory.
            slots_on: the device that units are copied to when they are used; None uses them where they wait.
        """
        units = _units(base, layers)
        self.device = slots_on or torch.device("cpu")
        pin = slots_on is not None and slots_on.type == "cuda"
        self._units = units
        self._store: _Store = _HostStore(units, pin=pin) if folder is None else _FileStore(units, folder)
        self._slots = None if slots_on is None else _Slots(units, slots_on)
        self._number = {module: number for number, unit in enumerate(units) for module in unit.modules}
        self._hooks = self._around_call(base.get_input_embeddings())
        place = "host memory" if folder is None else str(folder)
        self.report = StreamReport(units[-1].end, max(unit.num_bytes for unit in units), place)

    @contextmanager
    def use(self, module: nn.Module, *, backward: bool = False) -> Iterator[None]:
        """Hold a module's frozen weights while it runs, and fetch those of the next unit in this direction."""
        number = self._number.get(module)
        if number is None:
            yield
            return
        unit = self._units[number]
        following = self._units[(number + (-1 if backward else 1)) % len(self._units)]
        if self._slots is not None:
            unit.point_to(self._slots.bring(unit))
            self._slots.fetch(following, beside=unit)
        else:
            self._store.will_need(following)
        try:
            yield
        finally:
            if self._slots is not None:
                unit.point_to(unit.waiting)
                self._slots.release(unit)
            self._store.let_go(unit)

    def close(self) -> None:
        """Stop streaming: weights that were copied to a device go back to it, those of a file are read in place."""
        self.leave_waiting()
        if self._slots is not None:
            for unit in self._units:
                unit.point_to(tuple(value.to(self.device, copy=True) for value in unit.waiting))

    def leave_waiting(self) -> None:
        """Stop streaming and leave the weights in the store, which lives as long as they do."""
        for hook in self._hooks:
            hook.remove()

    def _around_call(self, embedding: nn.Module) -> tuple[RemovableHandle, ...]:
        """The embedding is called by the decoder, not by the sweep: hooks hold its matrix for the time of the call."""
        held: list[Any] = []

        def enter(module: nn.Module, args: Any) -> None:
            held.append(self.use(module))
            held[-1].__enter__()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            held.pop().__exit__(None, None, None)

        return embedding.register_forward_pre_hook(enter), embedding.register_forward_hook(leave, always_call=True)
