"""Memory of its own for what outlives a tile, where the heap would be left with holes.

The C library keeps freed blocks of up to 32 MiB for later requests. A sweep frees layer inputs, saved attention, keys
and values in sizes that the next request seldom fits, and a small block that stays, such as a gradient, spoils the
place of a large one: after the backward of SmolLM2-135M on 8,192 tokens 860 of 1,100 MB of heap were holes. What lives
longer than a tile therefore gets a mapping of its own on a CPU, which goes back to the system as a whole; the heap is
left with the activations of one tile, whose sizes repeat. Touching fresh pages takes well below a thousandth of a
layer's time. (``malloc_trim`` after each layer gave the holes back too, and took 15 % of a step.)

On other devices torch's own allocator does this work.

What is still left of the heap's holes is given back to the system at the moments of a step when they are many
(:func:`give_back`).
"""

import ctypes
import math
import mmap
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALLEST_BYTES = 64 << 10
"""Less is left to the heap, which does not grow by it."""

NEAR_PEAK = 0.95
"""Resident memory over the process's peak from which the holes of the heap count: one more layer adds a few percent."""


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Make an uninitialised tensor beside ``like``: its device, and its dtype unless another is given.

    Raises: MemoryError: the system has no such memory.
    """
    dtype = dtype or like.dtype
    num_bytes = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or type(like) is not Tensor or num_bytes < SMALLEST_BYTES:
        return like.new_empty(shape, dtype=dtype)
    try:
        memory = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype)
    except OSError as error:
        raise MemoryError(f"{num_bytes:,} bytes for {list(shape)} in {dtype}: {error.strerror}") from error
    # No view of it: autograd would refuse the next layer, which writes over a layer's output.
    return torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), 0, shape, memory.view(shape).stride())


def give_back(device: torch.device) -> None:
    """Hand the holes of the heap back to the system where they would raise the peak: on a CPU with glibc.

    glibc keeps freed blocks of up to 32 MiB for later requests. What outlives a tile has a mapping of its
    own, so the holes left are those of a tile's activations: after a forward pass of SmolLM2-135M 60 MB, within a
    backward pass 80 MB. The phase that follows asks for other sizes, and would come on top; so would the layers of a
    backward pass, each by a little: three steps on 4,096 tokens peaked at 1,332, 1,340 and 1,439 MB without trims
    between layers, and at 1,332, 1,323 and 1,341 MB with one after every fourth. But ``malloc_trim`` takes a hundredth
    of a second for some hundred megabytes, and touching the pages again a tenth. Below the peak of the process it gains
    nothing, and resident memory falls through a backward pass whose layer inputs wait in memory; so holes are given
    back only within :data:`NEAR_PEAK` of it. That is a step of 2,048 tokens in 7.9 s instead of 8.5, at the same peak.
    """
    trim = _malloc_trim()
    if device.type == "cpu" and trim is not None and resident_bytes() > NEAR_PEAK * peak_bytes():
        trim(0)


def resident_bytes() -> int:
    """Return the resident memory of this process, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def peak_bytes() -> int:
    """Return the most resident memory this process has had, on Linux."""
    # Not getrusage: its maximum is inherited from the parent through fork and exec.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:", 1)[1].split(maxsplit=1)[0]) << 10


@cache
def _malloc_trim() -> Any | None:
    has_it = platform.libc_ver()[0] == "glibc" and Path("/proc/self/statm").exists()
    return ctypes.CDLL(None).malloc_trim if has_it else None
