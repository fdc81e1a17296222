"""Memory in which all tiles of logits are made, one after the other.

A tile of logits is tens of megabytes, in 16 bits and again in float32. Asked for anew for every tile, the narrow one
comes from the C library's heap, where some small block soon lies in the place it left, so that the next tile finds none
of its size: 50 to 100 MB of a training step on a CPU were such holes. The wide one comes from the system, page after
page. Made once and used by all tiles, they cost what they hold, and no page is touched for the first time twice.
"""

import torch
from torch import Tensor

from longfit.engine import host_memory


class LogitsRoom:
    """Room for one tile of logits in the dtype of the products, and one in the dtype of the sums."""

    def __init__(self, like: Tensor, *, num_logits: int, dtype: torch.dtype, sum_dtype: torch.dtype) -> None:
        """Make room for ``num_logits`` logits on the device of ``like``."""
        self._narrow = host_memory.empty(like, (num_logits,), dtype)
        self._wide = self._narrow if dtype == sum_dtype else host_memory.empty(like, (num_logits,), sum_dtype)

    def products(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``hidden weight^T + bias`` in their own dtype, [t, D], [v, D] -> [t, v]; over the tile before."""
        narrow = self._part(self._narrow, len(hidden), len(weight))
        if bias is None:
            torch.mm(hidden, weight.t(), out=narrow)
        else:
            torch.addmm(bias, hidden, weight.t(), out=narrow)
        return narrow

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``products`` in the dtype of the sums."""
        narrow = self.products(hidden, weight, bias)
        return narrow if self._wide is self._narrow else self._part(self._wide, *narrow.shape).copy_(narrow)

    def narrowed(self, logits: Tensor) -> Tensor:
        """A tile of this room in the dtype of the products, [t, v]."""
        return logits if self._wide is self._narrow else self._part(self._narrow, *logits.shape).copy_(logits)

    def _part(self, memory: Tensor, rows: int, columns: int) -> Tensor:
        return memory[: rows * columns].view(rows, columns)
