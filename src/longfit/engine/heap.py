"""Give the holes of the C library's heap back to the system, at the two moments of a step when they are many.

glibc keeps freed blocks of up to 32 MiB for later requests. What outlives a tile has a mapping of its own
(``mapping.py``), so the holes left are those of a tile's activations: after a forward pass of SmolLM2-135M 60 MB, after
a backward pass 200 MB. The phase that follows asks for other sizes, and would come on top. ``malloc_trim`` takes a
hundredth of a second for some hundred megabytes, and touching the pages again a tenth; once a layer that was 15 % of a
step, twice a step it is a hundredth.

Not here: other devices, where torch's own allocator does this work, and other C libraries.
"""

import ctypes
import platform
from functools import cache
from typing import Any

import torch


def give_back(device: torch.device) -> None:
    """Hand the holes of the heap back to the system, if ``device`` is the CPU and its C library is glibc."""
    trim = _malloc_trim()
    if device.type == "cpu" and trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any | None:
    return ctypes.CDLL(None).malloc_trim if platform.libc_ver()[0] == "glibc" else None
