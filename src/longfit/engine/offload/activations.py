"""Where layer inputs wait between forward and backward.

The sweep saves one thing per layer: its input, tile by tile: ``layers x hidden size x 2`` bytes a token, 262 kB for an
8B model. An ``ActivationOffload`` says where. It hands out one ``SavedInput`` per layer pass, which is put tile by tile
in forward and got in backward.

    DeviceActivations   the tensors as they are, or copies of them, on their own device
    FileActivations     a file that is deleted as it is made; read and written, not mapped, so that it costs no memory
    PinnedActivations   pinned host memory of a CUDA device (``pinned_activations.py``)
"""

import os
import shutil
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from longfit.compat.torch import version_of
from longfit.errors import PlanError
from longfit.files import parts
from longfit.files.writing import FULL
from longfit.words import format_bytes


class SavedInput(Protocol):
    """The input of one layer pass, put tile by tile in forward and taken back, in any order, in backward."""

    def put(self, index: int, tile: Tensor) -> None:
        """Keep a tile ``[B, t, D]``; the caller may overwrite it after ``settle(index)``."""
        ...

    def settle(self, index: int) -> None:
        """Order the current stream after the reading of a tile that was put."""
        ...

    def prefetch(self, index: int) -> None:
        """Say that a tile is soon to be got."""
        ...

    def get(self, index: int) -> Tensor:
        """The tile, byte for byte on the device it came from; not to be changed."""
        ...

    def close(self) -> None:
        """Give the space back; nothing can be got any more."""
        ...


class ActivationOffload(Protocol):
    """A place for layer inputs.

    Attributes:
        aliases: whether it keeps the very tensors it is given, so that they must not be overwritten.
        place: where that is, as a report says it.
    """

    aliases: bool
    place: str

    def open(self, num_tiles: int) -> SavedInput:
        """Begin with the input of one layer pass."""
        ...

    def open_states(self, num_tiles: int) -> SavedInput:
        """Begin with the states that a layer pass carries from tile to tile; they are got while its input is."""
        ...


# ------------------------------------------------------------------------------------------------ where the tensors are
class DeviceActivations:
    """Keeps tiles on their device: what a CPU wants, and a device with memory to spare."""

    def __init__(self, *, copy: bool = False) -> None:
        """Keep the tensors themselves, or, with ``copy``, copies: then layers may write outputs over inputs."""
        self.aliases = not copy
        self.place = "copied on their device" if copy else "on their device"

    def open(self, num_tiles: int) -> "_DeviceInput":
        return _DeviceInput(self.aliases)

    def open_states(self, num_tiles: int) -> "_DeviceInput":
        return _DeviceInput(self.aliases)


class _DeviceInput:
    def __init__(self, aliases: bool) -> None:
        self._aliases = aliases
        self._tiles: dict[int, tuple[Tensor, int]] = {}

    def put(self, index: int, tile: Tensor) -> None:
        saved = tile if self._aliases else tile.clone()
        self._tiles[index] = (saved, version_of(saved))

    def settle(self, index: int) -> None:
        pass

    def prefetch(self, index: int) -> None:
        pass

    def get(self, index: int) -> Tensor:
        tile, version = self._tiles[index]
        if version_of(tile) != version:
            raise RuntimeError(
                "the input of a swept layer was changed in place between forward and backward, so its gradient would be"
                " wrong; clone the hidden states before changing them"
            )
        return tile

    def close(self) -> None:
        self._tiles.clear()


class HostStates:
    """Keeps the states of a layer pass in host memory: a few MB a tile, copied when they are wanted."""

    def __init__(self) -> None:
        self._states: dict[int, tuple[Tensor, torch.device]] = {}

    def put(self, index: int, tile: Tensor) -> None:
        self._states[index] = tile.detach().cpu(), tile.device

    def settle(self, index: int) -> None:
        pass

    def prefetch(self, index: int) -> None:
        pass

    def get(self, index: int) -> Tensor:
        state, device = self._states[index]
        return state.to(device)

    def close(self) -> None:
        self._states.clear()


# ------------------------------------------------------------------------------------------------ a file
@dataclass(frozen=True)
class _Stretch:
    offset: int
    num_bytes: int


class FileActivations:
    """Keeps tiles in a file without a name, which the system deletes when the process ends, however it ends.

    The file is read and written, not mapped: mapped pages count as memory of the process, the page cache does not, and
    the kernel drops it when somebody needs the space. Space is used again by later layers and steps.
    """

    aliases = False

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        """Make the file in ``folder``, default the system's folder for temporary files.

        That folder is memory, not disk, on systems that mount it as tmpfs; name another one there.
        """
        self.folder = Path(folder or tempfile.gettempdir())
        self.place = f"in a file in {self.folder}"
        self._file: Any = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  (lives as long as this)
        self._end = 0
        self._free: dict[int, list[_Stretch]] = defaultdict(list)

    def open(self, num_tiles: int) -> "_FileInput":
        return _FileInput(self)

    def open_states(self, num_tiles: int) -> "_FileInput":
        return _FileInput(self)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._end

    def take(self, num_bytes: int) -> _Stretch:
        """Take a stretch of the file; the space is reserved now, so that a full disk shows here.

        Raises: PlanError: the disk is full.
        """
        if self._free[num_bytes]:
            return self._free[num_bytes].pop()
        slot = _Stretch(self._end, num_bytes)
        try:
            parts.reserve(self._file.fileno(), slot.offset, num_bytes)
        except OSError as error:
            if error.errno not in FULL:
                raise
            left = shutil.disk_usage(self.folder).free
            raise PlanError(
                f"{self.folder}: full after {format_bytes(self._end)} of layer inputs ({format_bytes(left)} left); free"
                " space, name another folder, or shorten the context"
            ) from error
        self._end += num_bytes
        return slot

    def give(self, slot: _Stretch) -> None:
        """Give a stretch back."""
        self._free[slot.num_bytes].append(slot)

    def write(self, slot: _Stretch, data: memoryview) -> None:
        """Write all of ``data``."""
        parts.write(self._file.fileno(), slot.offset, data)

    def read(self, slot: _Stretch, data: memoryview) -> None:
        """Fill all of ``data``."""
        if parts.read(self._file.fileno(), slot.offset, data) < slot.num_bytes:
            raise PlanError(f"{self.folder}: the file of layer inputs ends early; was it truncated by someone?")

    def will_need(self, slot: _Stretch) -> None:
        """Let the kernel read ahead."""
        if sys.platform == "linux":
            os.posix_fadvise(self._file.fileno(), slot.offset, slot.num_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


class _FileInput:
    def __init__(self, offload: FileActivations) -> None:
        self._offload = offload
        self._tiles: dict[int, tuple[_Stretch, torch.Size, torch.dtype, torch.device]] = {}

    def put(self, index: int, tile: Tensor) -> None:
        data = tile.detach().contiguous().cpu()
        slot = self._offload.take(data.numel() * data.element_size())
        self._offload.write(slot, _bytes_of(data))
        self._tiles[index] = (slot, tile.shape, tile.dtype, tile.device)

    def settle(self, index: int) -> None:
        pass

    def prefetch(self, index: int) -> None:
        self._offload.will_need(self._tiles[index][0])

    def get(self, index: int) -> Tensor:
        slot, shape, dtype, device = self._tiles[index]
        tile = torch.empty(shape, dtype=dtype)
        self._offload.read(slot, _bytes_of(tile))
        return tile.to(device)

    def close(self) -> None:
        while self._tiles:
            self._offload.give(self._tiles.popitem()[1][0])

    def __del__(self) -> None:
        self.close()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
