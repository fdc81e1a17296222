"""Attention outputs saved from forward to backward, as far as a byte budget goes.

Recomputing a layer costs about as much as its forward, and on long sequences most of that is attention, whose cost per
token grows with the context. Its result is small: one vector of the hidden size and one number a head. What is saved is
not computed again, and the rest is; either way the bits are the same. The budget is a constant, so that a token of
context costs no more memory than before.

Which attention to save of all that could be is the choice of selective recomputation (Korthikanti et al. 2022, section
5) turned round: there attention is what is recomputed, as its scores were large; without scores it is the best to save.
"""

from weakref import WeakSet

import torch
from torch import Tensor

from longfit.engine import host_memory


class SavedAttention:
    """Output ``[B, H, t, D]`` and log-sum-exp ``[B, H, t]`` of some tiles of one layer; gone with the graph.

    All of a layer lie in one allocation, and between ``put`` and ``take`` no tensor exists for a tile: objects of a
    hundred bytes that stay would each take a corner of a large free block of the heap, which the next tile's
    activations then no longer fit into (360 MB of such holes after 14 layers of 8 tiles).
    """

    def __init__(self, budget: "SavedAttentionBudget", num_tiles: int) -> None:
        """Be empty, and pay from ``budget`` for at most ``num_tiles``, of which the first is no smaller than others."""
        self._budget = budget
        self._num_tiles = num_tiles
        self._storage: tuple[Tensor, Tensor] | None = None  # [N, D] and [N], N vectors of heads of all tiles
        self._used = 0
        self._shapes: dict[int, tuple[int, torch.Size]] = {}  # where a tile begins in it, and its output's shape
        self.num_bytes = 0

    def put(self, index: int, out: Tensor, lse: Tensor) -> None:
        """Save the attention of a tile if the budget allows."""
        num_bytes, vectors, left = out.nbytes + lse.nbytes, lse.numel(), self._budget.left
        if num_bytes > left:
            return
        if self._storage is None:
            most = min(self._num_tiles * vectors, left * vectors // max(1, num_bytes))
            self._storage = host_memory.empty(out, (most, out.shape[3])), host_memory.empty(lse, (most,))
        if self._used + vectors > len(self._storage[1]):  # the budget has grown since: another layer's graph is gone
            return
        for place, tensor in zip(self._places(self._used, out.shape), (out, lse), strict=True):
            place.copy_(tensor)
        self._shapes[index] = self._used, out.shape
        self._used += vectors
        self.num_bytes += num_bytes

    def take(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Hand over the attention of a tile, once; None if it was not saved. The storage goes with the last tile."""
        if index not in self._shapes:
            return None
        out, lse = self._places(*self._shapes.pop(index))
        self.num_bytes -= out.nbytes + lse.nbytes
        if not self._shapes:
            self._storage, self._used = None, 0
        return out, lse

    def _places(self, start: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Views of the storage: ``[B, H, t, D]`` stored as ``[B, t, H, D]``, and ``[B, H, t]``."""
        assert self._storage is not None
        batch, heads, tokens, size = shape
        out, lse = (whole[start : start + batch * heads * tokens] for whole in self._storage)
        return out.view(batch, tokens, heads, size).transpose(1, 2), lse.view(batch, heads, tokens)


class SavedAttentionBudget:
    """The bytes that all layers share. A layer whose graph was dropped without a backward pays no longer."""

    def __init__(self, num_bytes: int) -> None:
        """Allow ``num_bytes``; 0 saves nothing."""
        self.num_bytes = num_bytes
        self._layers: WeakSet[SavedAttention] = WeakSet()

    def open(self, num_tiles: int) -> SavedAttention:
        """Begin a layer's forward pass."""
        layer = SavedAttention(self, num_tiles)
        self._layers.add(layer)
        return layer

    @property
    def left(self) -> int:
        """Bytes that are free."""
        return self.num_bytes - sum(layer.num_bytes for layer in self._layers)
