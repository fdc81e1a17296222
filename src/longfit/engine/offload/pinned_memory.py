"""Host memory that a card copies from and to beside its kernels: exact in size, given back to CUDA when its owner goes.

torch's own pinned memory rounds up to a power of two, twice what is needed at worst. Here whole pages are mapped and
registered with CUDA. A mapping that disappears while it is registered makes the next registration of the same addresses
fail, so its owner takes the registration back first.
"""

import mmap
import weakref

import torch
from torch import Tensor

from longfit.errors import PlanError
from longfit.words import format_bytes


class PinnedMemory:
    """Owner of slabs of pinned host memory."""

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        # Not at exit: the process takes everything with it, and CUDA may be gone by then.
        weakref.finalize(self, _unregister, self._slabs).atexit = False

    def slab(self, num_bytes: int) -> Tensor:
        """Return new memory, uint8 ``[num_bytes]``, page-aligned, zero.

        Raises: PlanError: so much cannot be pinned.
        """
        memory = mmap.mmap(-1, max(1, -(-num_bytes // mmap.PAGESIZE)) * mmap.PAGESIZE)
        slab = torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes)
        status = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), len(memory), 0)
        if int(status) != 0:
            raise PlanError(
                f"{format_bytes(num_bytes)} of host memory cannot be pinned (CUDA error {int(status)}); raise the"
                " limit of locked memory (ulimit -l), shorten the context, or keep layer inputs in a file"
            )
        self._slabs.append(slab)
        return slab


def _unregister(slabs: list[Tensor]) -> None:
    """Wait for the copies under way, and take the registrations back."""
    if slabs:
        torch.cuda.synchronize()
    for slab in slabs:
        torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())
