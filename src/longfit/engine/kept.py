"""Attention outputs kept from forward to backward, as far as a byte budget goes.

Recomputing a layer costs about as much as its forward, and on long sequences most of that is attention, whose cost per
token grows with the context. Its result is small: one vector of the hidden size and one number a head. What is kept is
not computed again, and the rest is; either way the bits are the same. The budget is a constant, so that a token of
context costs no more memory than before.

Which attention to keep of all that could be is the choice of selective recomputation (Korthikanti et al. 2022, section
5) turned round: there attention is what is recomputed, as its scores were large; without scores it is the best to keep.
"""

from weakref import WeakSet

from torch import Tensor

from longfit.engine import mapping


class KeptAttention:
    """Output ``[B, H, t, D]`` and log-sum-exp ``[B, H, t]`` of some tiles of one layer; gone with the graph."""

    def __init__(self, budget: "KeptBudget") -> None:
        """Be empty, and pay from ``budget``."""
        self._budget = budget
        self._tiles: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_bytes = 0

    def put(self, index: int, out: Tensor, lse: Tensor) -> None:
        """Keep the attention of a tile if the budget allows."""
        num_bytes = _storage_bytes(out, lse)
        if num_bytes <= self._budget.left:
            self._tiles[index] = mapping.copy_of(out), mapping.copy_of(lse)
            self.num_bytes += num_bytes

    def take(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Hand over the attention of a tile, once; None if it was not kept."""
        found = self._tiles.pop(index, None)
        if found is not None:
            self.num_bytes -= _storage_bytes(*found)
        return found


class KeptBudget:
    """The bytes that all layers share. A layer whose graph was dropped without a backward pays no longer."""

    def __init__(self, num_bytes: int) -> None:
        """Allow ``num_bytes``; 0 keeps nothing."""
        self.num_bytes = num_bytes
        self._layers: WeakSet[KeptAttention] = WeakSet()

    def open(self) -> KeptAttention:
        """Begin a layer's forward pass."""
        layer = KeptAttention(self)
        self._layers.add(layer)
        return layer

    @property
    def left(self) -> int:
        """Bytes that are free."""
        return self.num_bytes - sum(layer.num_bytes for layer in self._layers)


def _storage_bytes(*tensors: Tensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
