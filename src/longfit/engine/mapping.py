"""Memory of its own for what outlives a tile, where the heap would be left with holes.

The C library keeps freed blocks of up to 32 MiB for later requests. A sweep frees layer inputs, kept attention, keys
and values in sizes that the next request seldom fits, and a small block that stays, such as a gradient, spoils the
place of a large one: after the backward of SmolLM2-135M on 8,192 tokens 860 of 1,100 MB of heap were holes. What lives
longer than a tile therefore gets a mapping of its own on a CPU, which goes back to the system as a whole; the heap is
left with the activations of one tile, whose sizes repeat. Touching fresh pages takes well below a thousandth of a
layer's time. (``malloc_trim`` after each layer gave the holes back too, and took 15 % of a step.)

On other devices torch's own allocator does this work.
"""

import math
import mmap

import torch
from torch import Tensor

SMALLEST_BYTES = 64 << 10
"""Less is left to the heap, which does not grow by it."""


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
