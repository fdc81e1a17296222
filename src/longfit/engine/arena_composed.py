"""Arenas made of other arenas: several tiers with budgets, and 8-bit storage."""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from longfit.engine.arena import Arena, Stay


class EightBitArena:
    """Keeps tiles in another arena as signed 8-bit numbers, scaled per token and block of channels.

    Half the bytes of bf16 (``1 + 4 / BLOCK`` a number). The layer is then recomputed from an input that is off by up
    to half a step of its block, so gradients change a little; ``check.admit_arena`` measures by how much.
    """

    aliases = False
    BLOCK = 128  # channels per scale: a few channels of a language model are far larger than the rest of their token

    def __init__(self, inner: Arena) -> None:
        self.inner = inner

    def open(self, num_tiles: int) -> "_EightBitStay":
        return _EightBitStay(self.inner.open(num_tiles), self.BLOCK)


class _EightBitStay:
    def __init__(self, inner: Stay, block: int) -> None:
        self._inner, self._block = inner, block
        self._dtypes: dict[int, tuple[torch.dtype, int]] = {}

    def put(self, index: int, tile: Tensor) -> None:
        self._dtypes[index] = (tile.dtype, tile.shape[-1])
        self._inner.put(index, _to_eight_bits(tile, self._block))

    def settle(self, index: int) -> None:
        self._inner.settle(index)

    def prefetch(self, index: int) -> None:
        self._inner.prefetch(index)

    def get(self, index: int) -> Tensor:
        dtype, channels = self._dtypes[index]
        return _from_eight_bits(self._inner.get(index), channels, self._block, dtype)

    def close(self) -> None:
        self._inner.close()


def _to_eight_bits(tile: Tensor, block: int) -> Tensor:
    """[B, t, D] -> uint8 [B, t, D' + 4 D' / block]: codes, then float32 scales; D' is D filled up to whole blocks."""
    channels = tile.shape[-1]
    filled = torch.nn.functional.pad(tile.float(), (0, -channels % block)).unflatten(
        -1, (-1, block)
    )  # [B, t, n, block]
    scale = filled.abs().amax(-1, keepdim=True) / 127.0
    codes = torch.where(scale > 0, filled / scale, 0.0).round_().to(torch.int8).flatten(-2)
    return torch.cat([codes.view(torch.uint8), scale.squeeze(-1).contiguous().view(torch.uint8)], -1)


def _from_eight_bits(stored: Tensor, channels: int, block: int, dtype: torch.dtype) -> Tensor:
    num_blocks = math.ceil(channels / block)
    codes, scale = stored.split([num_blocks * block, 4 * num_blocks], -1)
    values = (
        codes.contiguous().view(torch.int8).unflatten(-1, (-1, block))
        * scale.contiguous().view(torch.float32)[..., None]
    )
    return values.flatten(-2)[..., :channels].to(dtype)


class TieredArena:
    """Fills arenas in order: each tile goes to the first tier whose budget still holds it, else to the last arena."""

    aliases = False

    def __init__(self, tiers: Sequence[tuple[Arena, int]], last: Arena) -> None:
        """Give every tier but the last a budget in bytes.

        Raises: ValueError: an arena keeps the tensors themselves (use ``MemoryArena(copy=True)``).
        """
        self.arenas = [arena for arena, _ in tiers] + [last]
        self.left = [budget for _, budget in tiers]
        if any(arena.aliases for arena in self.arenas):
            raise ValueError("TieredArena: a tier keeps the tensors it is given; use MemoryArena(copy=True)")

    def open(self, num_tiles: int) -> "_TieredStay":
        return _TieredStay(self, num_tiles)


class _TieredStay:
    def __init__(self, arena: TieredArena, num_tiles: int) -> None:
        self._arena, self._num_tiles = arena, num_tiles
        self._stays: dict[int, Stay] = {}
        self._tier: dict[int, int] = {}
        self._taken: dict[int, int] = defaultdict(int)

    def put(self, index: int, tile: Tensor) -> None:
        size, left = tile.numel() * tile.element_size(), self._arena.left
        tier = next((tier for tier, budget in enumerate(left) if budget >= size), len(left))
        if tier < len(left):
            left[tier] -= size
            self._taken[tier] += size
        if tier not in self._stays:
            self._stays[tier] = self._arena.arenas[tier].open(self._num_tiles)
        self._tier[index] = tier
        self._stays[tier].put(index, tile)

    def settle(self, index: int) -> None:
        self._stays[self._tier[index]].settle(index)

    def prefetch(self, index: int) -> None:
        self._stays[self._tier[index]].prefetch(index)

    def get(self, index: int) -> Tensor:
        return self._stays[self._tier[index]].get(index)

    def close(self) -> None:
        for stay in self._stays.values():
            stay.close()
        for tier, size in self._taken.items():
            self._arena.left[tier] += size
        self._stays.clear()
        self._taken.clear()

    def __del__(self) -> None:
        self.close()
