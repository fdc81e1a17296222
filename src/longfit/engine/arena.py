"""Where layer inputs wait between forward and backward.

The sweep saves one thing per layer: its input, tile by tile. An arena says where: in plain memory, in pinned memory, in
a file, on the device, or in 8 bits. It hands out one ``Stay`` per layer pass.
"""

from typing import Protocol

from torch import Tensor


class Stay(Protocol):
    """The input of one layer pass, put tile by tile in forward and taken back, in any order, in backward."""

    def put(self, index: int, tile: Tensor) -> None:
        """Keep a tile ``[B, t, D]``; the caller may overwrite it after ``settle(index)``."""
        ...

    def settle(self, index: int) -> None:
        """Order the current stream after the reading of a tile that was put."""
        ...

    def prefetch(self, index: int) -> None:
        """Say that a tile is the next to be got."""
        ...

    def get(self, index: int) -> Tensor:
        """The tile, byte for byte (unless the arena says otherwise), on the device it came from."""
        ...

    def close(self) -> None:
        """Give the space back; nothing can be got any more."""
        ...


class Arena(Protocol):
    """A place for layer inputs.

    Attributes:
        aliases: whether it keeps the very tensors it is given, so that they must not be overwritten.
    """

    aliases: bool

    def open(self, num_tiles: int) -> Stay:
        """Begin the stay of one layer's input."""
        ...


class MemoryArena:
    """Keeps the tensors themselves: no copy. What a CPU wants, and a device with memory to spare."""

    aliases = True

    def open(self, num_tiles: int) -> "_KeptStay":
        return _KeptStay(num_tiles)


class _KeptStay:
    def __init__(self, num_tiles: int) -> None:
        self._tiles: list[tuple[Tensor, int] | None] = [None] * num_tiles

    def put(self, index: int, tile: Tensor) -> None:
        self._tiles[index] = (tile, tile._version)

    def settle(self, index: int) -> None:
        pass

    def prefetch(self, index: int) -> None:
        pass

    def get(self, index: int) -> Tensor:
        kept = self._tiles[index]
        assert kept is not None, f"tile {index} was never put"
        tile, version = kept
        if tile._version != version:
            raise RuntimeError(
                "the input of a swept layer was changed in place between forward and backward, so its gradient would be"
                " wrong; clone the hidden states before changing them"
            )
        return tile

    def close(self) -> None:
        self._tiles = []
