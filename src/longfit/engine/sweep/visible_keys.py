"""Which keys each tile of a pass needs, in whole tiles: what is stored before its turn, and how much at most."""

from dataclasses import dataclass

from longfit.attention.visibility import Schedule


@dataclass(frozen=True)
class VisibleKeys:
    """Which keys each tile needs. Keys are numbered from the first of the halo.

    Attributes:
        tile: tokens per tile; the last may be shorter.
        num_tokens: of the halo and of all tiles.
        lows: first token of the first tile that each tile sees, or a token of the halo.
        halo: tokens in front of the first tile, whose keys are known.
    """

    tile: int
    num_tokens: int
    lows: tuple[int, ...]
    halo: int = 0

    @classmethod
    def of(cls, schedule: Schedule, tile: int, *, halo: int = 0) -> "VisibleKeys":
        """Read the schedule; it never decreases, so the first query of a tile sees furthest back."""
        first = schedule.host[:, :, halo::tile].amin(dim=(0, 1)).tolist()
        lows = (key if key < halo else halo + (key - halo) // tile * tile for key in first)
        return cls(tile, schedule.num_tokens, tuple(lows), halo)

    @classmethod
    def of_no_attention(cls, num_tokens: int, tile: int) -> "VisibleKeys":
        """A layer that does not attend: a tile needs no keys but what would be its own."""
        return cls(tile, num_tokens, tuple(range(0, num_tokens, tile)))

    @property
    def capacity(self) -> int:
        """Tokens of the widest range that a tile sees, its own included."""
        return max(self.span(index)[1] - low for index, low in enumerate(self.lows))

    def keys_of(self, index: int) -> tuple[int, int]:
        """First key that a tile sees, and the one after its last."""
        return self.lows[index], self.span(index)[1]

    def span(self, index: int) -> tuple[int, int]:
        """First token of a tile, and the one after its last."""
        return self.halo + index * self.tile, min(self.halo + (index + 1) * self.tile, self.num_tokens)

    def new_tiles(self, index: int) -> range:
        """Tiles before ``index`` whose keys it is the first to need, going from last to first."""
        known = self._tile_of(self.lows[index + 1]) if index + 1 < len(self.lows) else index
        return range(self._tile_of(self.lows[index]), min(known, index))

    def _tile_of(self, low: int) -> int:
        return max(low - self.halo, 0) // self.tile
