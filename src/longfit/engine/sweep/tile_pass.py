"""The pass over the tiles of one layer: what travels down to the attention function as ``sweep=``.

    forward     tiles first to last: store the tile's K, V; attend over all keys it sees
    keys        store the tile's K, V and leave the layer: nothing after them is wanted
    leave       leave the layer with the tile's K, V, which the caller wants (``shared_sequence.py``)
    gradients   tiles last to first: attend with a graph; its backward adds to dK, dV of all keys the tile sees, and
                hands the tile's own k, v their finished dK, dV

Why finished: by causality only the queries of this tile and of later ones touch the keys of this tile, and the later
ones have been differentiated before. So one backward per tile closes its graph, and no graph outlives its tile.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longfit.attention.backends import tile_backward, tile_forward
from longfit.attention.visibility import Schedule, build_schedule, document_starts
from longfit.engine.sweep.kv_window import Window
from longfit.engine.sweep.saved_attention import SavedAttention
from longfit.engine.sweep.shared_sequence import Asked, Stretch, TileLeft
from longfit.errors import ModelError


@dataclass(frozen=True)
class Visible:
    """Which keys each tile needs, in whole tiles. Keys are numbered from the first of the halo.

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
    def of(cls, schedule: Schedule, tile: int, *, halo: int = 0) -> "Visible":
        """Read the schedule; it never decreases, so the first query of a tile sees furthest back."""
        first = schedule.host[:, :, halo::tile].amin(dim=(0, 1)).tolist()
        lows = (key if key < halo else halo + (key - halo) // tile * tile for key in first)
        return cls(tile, schedule.num_tokens, tuple(lows), halo)

    @property
    def capacity(self) -> int:
        """Tokens of the widest range that a tile sees, its own included."""
        return max(self.span(index)[1] - low for index, low in enumerate(self.lows))

    def span(self, index: int) -> tuple[int, int]:
        """First token of a tile, and the one after its last."""
        return self.halo + index * self.tile, min(self.halo + (index + 1) * self.tile, self.num_tokens)

    def new_tiles(self, index: int) -> range:
        """Tiles before ``index`` whose keys it is the first to need, going from last to first."""
        known = self._tile_of(self.lows[index + 1]) if index + 1 < len(self.lows) else index
        return range(self._tile_of(self.lows[index]), min(known, index))

    def _tile_of(self, low: int) -> int:
        return max(low - self.halo, 0) // self.tile


@dataclass(frozen=True)
class Seen:
    """The keys ``[low, end)`` that a tile sees, and the arguments of tile attention, counted from ``low``."""

    low: int
    end: int
    key: Tensor  # [B, K, end - low, D]
    value: Tensor
    schedule: Schedule
    options: dict[str, Any]  # start, scaling, softcap


class TilePass:
    """State of one pass: the mode, the tile at hand, the windows of K, V and of their gradients."""

    def __init__(
        self,
        stretch: Stretch,
        tile: int,
        whole: dict[str, Any],
        *,
        saved: SavedAttention | None = None,
        visible: Visible | None = None,
    ) -> None:
        """Begin a pass.

        Args:
            stretch, tile: the tokens to go over, and tokens per tile.
            whole: the layer's keyword arguments before they were cut into tiles.
            saved: where forward leaves attention for backward; None saves nothing.
            visible: what the forward pass found; None for that pass itself.
        """
        self.stretch, self.tile, self.visible, self.saved_attention = stretch, tile, visible, saved
        self.mode, self.index, self.num_calls = "forward", 0, 0
        self._whole = whole
        self._schedule: Schedule | None = None
        self._stored: Window | None = None
        self._sums: Window | None = None
        self._halo: tuple[Tensor, Tensor] | None = None
        self._halo_missing = 0  # tokens of the halo that are not in the window yet: those before this number

    @property
    def span(self) -> tuple[int, int]:
        """First token of the tile at hand, and the one after its last, among the tokens of this process."""
        start = self.stretch.start + self.index * self.tile
        return start, min(start + self.tile, self.stretch.start + self.stretch.num_tokens)

    @property
    def number(self) -> int:
        """The number of the tile at hand among those of all stretches."""
        return self.stretch.first_tile + self.index

    def begin(self, mode: str, index: int) -> None:
        """Turn to a tile: "forward", "keys", "leave" or "gradients"."""
        self.mode, self.index, self.num_calls = mode, index, 0

    def see(self, schedule: Schedule, key: Tensor, value: Tensor) -> None:
        """Begin with a halo: its keys and values ``[B, K, n, D]``, and what the tokens see, numbered from its first."""
        self._schedule, self._halo, self._halo_missing = schedule, (key, value), key.shape[2]
        self.visible = self.visible or Visible.of(schedule, self.tile, halo=key.shape[2])

    def halo_gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of the halo's keys and values, when all tiles are differentiated: ``[B, K, n, D]``."""
        assert self._halo is not None and self.visible is not None  # noqa: PT018
        key, value = (torch.zeros_like(x) for x in self._halo)
        if self._sums is not None:  # else nothing before attention trains
            seen_from = self.visible.lows[0]
            for total, part in zip((key, value), self._sums.tokens(seen_from, self.visible.halo), strict=True):
                total[:, :, seen_from:] = part
        return key, value

    def turn_to_gradients(self, index: int) -> range:
        """Make room for the keys that tile ``index`` sees; returns the tiles whose keys must be stored first."""
        assert self.visible is not None, "the forward pass has seen no attention"
        if self._stored is not None:
            self._move(self._stored, self.visible.lows[index], self.visible.span(index)[1])
        return self.visible.new_tiles(index)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        group_size: int | None,
        sliding_window: int | None,
        scaling: float,
        softcap: float | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """Do what the mode asks with a tile's q [B, H, t, D], k and v [B, K, t, D]; returns [B, t, H, D]."""
        self._check(query, key)
        if self.mode == "leave":
            raise TileLeft(key, value, Asked(query.shape[1], key.shape[1], group_size, sliding_window))
        if self._schedule is None:
            starts = document_starts(
                query.shape[0],
                self.stretch.num_tokens,
                position_ids=None if position_ids is None else self._whole["position_ids"],
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
                device=query.device,
            )
            heads = query.shape[1]
            self._schedule = build_schedule(heads, starts, group_size=group_size, sliding_window=sliding_window)
        if self._halo is not None and attention_mask is not None:
            raise ModelError("a padding mask and a window shared by processes do not go together: pad with labels -100")
        self._store(key.detach(), value.detach(), self._schedule)
        if self.mode == "keys":
            raise TileLeft(key, value, Asked(query.shape[1], key.shape[1], group_size, sliding_window))
        seen = self._seen(self._schedule, {"scaling": scaling, "softcap": softcap})
        if self.mode == "forward":
            out, lse = tile_forward(query, seen.key, seen.value, seen.schedule, **seen.options)
            if self.saved_attention is not None:
                self.saved_attention.put(self.number, out, lse)
        else:
            out = _TileAttention.apply(query, key, value, self, seen)
        return out.transpose(1, 2)

    def gradient_sums(self, seen: Seen, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Running dK, dV of the keys that a tile sees, each [B, K, n, D]; newly seen keys begin at zero."""
        assert self.visible is not None
        if self._sums is None:
            self._sums = Window(seen.key, seen.value, capacity=self.visible.capacity, dtype=dtype)
            self._sums.low = self._sums.high = self.visible.num_tokens
        known = self._sums.low
        self._sums.move(seen.low, seen.end)
        for new in self._sums.tokens(seen.low, max(seen.low, min(known, seen.end))):
            new.zero_()
        return self._sums.tokens(seen.low, seen.end)

    def _check(self, query: Tensor, key: Tensor) -> None:
        self.num_calls += 1
        start, end = self.span
        if self.num_calls > 1:
            raise ModelError("a swept layer attends more than once; call disable_sweep(model) to train it plainly")
        if query.shape[2] != end - start or key.shape[2] != end - start:
            raise ModelError(
                f"a tile of {end - start} tokens attends with {query.shape[2]} queries and {key.shape[2]} keys: the"
                " layer adds tokens of its own, or a key/value cache is on; train with use_cache=False"
            )

    def _store(self, key: Tensor, value: Tensor, schedule: Schedule) -> None:
        self.visible = self.visible or Visible.of(schedule, self.tile)
        if self._stored is None:
            self._stored = Window(key, value, capacity=self.visible.capacity)
            if self.mode != "forward":
                self._move(self._stored, self.visible.lows[-1], self.visible.num_tokens)
        start, end = self.visible.span(self.index)
        if self.mode == "forward":
            self._move(self._stored, self.visible.lows[self.index], end)
        for place, tile in zip(self._stored.tokens(start, end), (key, value), strict=True):
            place.copy_(tile)

    def _move(self, stored: Window, low: int, high: int) -> None:
        """Turn the window of keys to a range, and put in what newly belongs to it of the halo."""
        stored.move(low, high)
        if self._halo is not None and low < self._halo_missing:
            new = slice(low, min(self._halo_missing, high))
            for place, halo in zip(stored.tokens(new.start, new.stop), self._halo, strict=True):
                place.copy_(halo[:, :, new])
            self._halo_missing = low

    def _seen(self, schedule: Schedule, options: dict[str, Any]) -> Seen:
        assert self.visible is not None and self._stored is not None  # noqa: PT018
        low, (start, end) = self.visible.lows[self.index], self.visible.span(self.index)
        if low:
            schedule = schedule.since(low, end)
        return Seen(low, end, *self._stored.tokens(low, end), schedule, {"start": start - low, **options})


class _TileAttention(torch.autograd.Function):
    """Attention of a tile whose keys and values wait in the pass's windows; k, v only receive their gradient here."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tile_pass: TilePass, seen: Seen) -> Tensor:
        saved = None if tile_pass.saved_attention is None else tile_pass.saved_attention.take(tile_pass.number)
        out, lse = saved or tile_forward(query, seen.key, seen.value, seen.schedule, **seen.options)
        ctx.save_for_backward(query, out, lse)
        ctx.tile_pass, ctx.seen, ctx.dtypes = tile_pass, seen, (key.dtype, value.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, out, lse = ctx.saved_tensors
        seen: Seen = ctx.seen
        sums = ctx.tile_pass.gradient_sums(seen, lse.dtype)
        grad_query = tile_backward(
            grad_out,
            query,
            seen.key,
            seen.value,
            out,
            lse,
            seen.schedule,
            **seen.options,
            grad_k=sums[0],
            grad_v=sums[1],
        )
        own = slice(seen.options["start"], None)
        finished = (total[:, :, own].to(dtype, copy=True) for total, dtype in zip(sums, ctx.dtypes, strict=True))
        return grad_query, *finished, None, None
