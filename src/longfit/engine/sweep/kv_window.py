"""Storage for keys and values (or their gradients) of a range of tokens that moves along the sequence.

With exact attention the range grows from, or shrinks to, everything, and the storage is the whole sequence. With
groups, sliding windows or short documents a tile sees a bounded range, and the storage is no larger than the widest of
them: then keys and values no longer cost anything per token of context.
"""

import torch
from torch import Tensor

from longfit.engine import host_memory


class KeyValueWindow:
    """Two contiguous ``[B, K, capacity, D]`` tensors, of which the tokens ``[low, high)`` are valid."""

    def __init__(self, key: Tensor, value: Tensor, *, capacity: int, dtype: torch.dtype | None = None) -> None:
        """Make room for ``capacity`` tokens like those of ``key`` and ``value``, in their dtype or another."""
        self._data = tuple(host_memory.empty(x, (*x.shape[:2], capacity, x.shape[3]), dtype) for x in (key, value))
        self._capacity = capacity
        self._origin = 0
        self.low = self.high = 0

    def move(self, low: int, high: int) -> None:
        """Turn to the tokens ``[low, high)``; those that were valid and still belong to the range stay so."""
        assert high - low <= self._capacity, (low, high, self._capacity)
        kept = max(low, self.low), min(high, self.high)
        beyond = high > self._origin + self._capacity
        if beyond or low < self._origin:
            origin = low if beyond else max(0, high - self._capacity)
            if kept[0] < kept[1]:
                self._shift(*kept, origin)
            self._origin = origin
        self.low, self.high = low, high

    def _shift(self, low: int, high: int, origin: int) -> None:
        source, target = slice(low - self._origin, high - self._origin), slice(low - origin, high - origin)
        for data in self._data:
            for head in range(data.shape[1]):  # the two ranges may overlap: one head's copy at a time stands aside
                data[:, head, target] = data[:, head, source].clone()

    def tokens(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """View the tokens ``[low, high)`` of the range: twice ``[B, K, high - low, D]``."""
        assert self.low <= low <= high <= self.high, (low, high, self.low, self.high)
        here = slice(low - self._origin, high - self._origin)
        key, value = self._data
        return key[:, :, here], value[:, :, here]
