"""The pass over the tiles of one layer: what travels down to the attention function as ``sweep=``.

    forward     tiles first to last: store the tile's K, V; attend over all keys it sees
    keys        store the tile's K, V and leave the layer: nothing after them is wanted
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
from longfit.errors import ModelError


class TileLeft(Exception):
    """The keys and values of a tile are stored; raised through the layer, caught by the sweep."""


@dataclass(frozen=True)
class Visible:
    """Which keys each tile needs, in whole tiles.

    Attributes:
        tile: tokens per tile; the last may be shorter.
        num_tokens: T.
        lows: first token of the first tile that each tile sees.
    """

    tile: int
    num_tokens: int
    lows: tuple[int, ...]

    @classmethod
    def of(cls, schedule: Schedule, tile: int) -> "Visible":
        """Read the schedule; it never decreases, so the first query of a tile sees furthest back."""
        first = schedule.host[:, :, ::tile].amin(dim=(0, 1))
        return cls(tile, schedule.num_tokens, tuple(key // tile * tile for key in first.tolist()))

    @property
    def capacity(self) -> int:
        """Tokens of the widest range that a tile sees, its own included."""
        return max(self.span(index)[1] - low for index, low in enumerate(self.lows))

    def span(self, index: int) -> tuple[int, int]:
        """First token of a tile, and the one after its last."""
        return index * self.tile, min((index + 1) * self.tile, self.num_tokens)

    def new_tiles(self, index: int) -> range:
        """Tiles before ``index`` whose keys it is the first to need, going from last to first."""
        known = self.lows[index + 1] // self.tile if index + 1 < len(self.lows) else index
        return range(self.lows[index] // self.tile, min(known, index))


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
    """State of one tile_pass: the mode, the tile at hand, the windows of K, V and of their gradients."""

    def __init__(
        self,
        num_tokens: int,
        tile: int,
        whole: dict[str, Any],
        *,
        saved: SavedAttention | None = None,
        visible: Visible | None = None,
    ) -> None:
        """Begin a tile_pass.

        Args:
            num_tokens, tile: T, and tokens per tile.
            whole: the layer's keyword arguments before they were cut into tiles.
            saved: where forward leaves attention for backward; None saves nothing.
            visible: what the forward pass found; None for that pass itself.
        """
        self.num_tokens, self.tile, self.visible, self.saved_attention = num_tokens, tile, visible, saved
        self.mode, self.index, self.num_calls = "forward", 0, 0
        self._whole = whole
        self._schedule: Schedule | None = None
        self._stored: Window | None = None
        self._sums: Window | None = None

    @property
    def span(self) -> tuple[int, int]:
        """First token of the tile at hand, and the one after its last."""
        return self.index * self.tile, min((self.index + 1) * self.tile, self.num_tokens)

    def begin(self, mode: str, index: int) -> None:
        """Turn to a tile: "forward", "keys" or "gradients"."""
        self.mode, self.index, self.num_calls = mode, index, 0

    def turn_to_gradients(self, index: int) -> range:
        """Make room for the keys that tile ``index`` sees; returns the tiles whose keys must be stored first."""
        assert self.visible is not None, "the forward pass has seen no attention"
        if self._stored is not None:
            self._stored.move(self.visible.lows[index], self.visible.span(index)[1])
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
        if self._schedule is None:
            starts = document_starts(
                query.shape[0],
                self.num_tokens,
                position_ids=None if position_ids is None else self._whole["position_ids"],
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
                device=query.device,
            )
            heads = query.shape[1]
            self._schedule = build_schedule(heads, starts, group_size=group_size, sliding_window=sliding_window)
        self._store(key.detach(), value.detach(), self._schedule)
        if self.mode == "keys":
            raise TileLeft
        seen = self._seen(self._schedule, {"scaling": scaling, "softcap": softcap})
        if self.mode == "forward":
            out, lse = tile_forward(query, seen.key, seen.value, seen.schedule, **seen.options)
            if self.saved_attention is not None:
                self.saved_attention.put(self.index, out, lse)
        else:
            out = _TileAttention.apply(query, key, value, self, seen)
        return out.transpose(1, 2)

    def gradient_sums(self, seen: Seen, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Running dK, dV of the keys that a tile sees, each [B, K, n, D]; newly seen keys begin at zero."""
        assert self.visible is not None
        if self._sums is None:
            self._sums = Window(seen.key, seen.value, capacity=self.visible.capacity, dtype=dtype)
            self._sums.low = self._sums.high = self.num_tokens
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
                self._stored.move(self.visible.lows[-1], self.num_tokens)
        start, end = self.span
        if self.mode == "forward":
            self._stored.move(self.visible.lows[self.index], end)
        for place, tile in zip(self._stored.tokens(start, end), (key, value), strict=True):
            place.copy_(tile)

    def _seen(self, schedule: Schedule, options: dict[str, Any]) -> Seen:
        assert self.visible is not None and self._stored is not None  # noqa: PT018
        low, (start, end) = self.visible.lows[self.index], self.span
        if low:
            schedule = schedule.since(low, end)
        return Seen(low, end, *self._stored.tokens(low, end), schedule, {"start": start - low, **options})


class _TileAttention(torch.autograd.Function):
    """Attention of a tile whose keys and values wait in the pass's windows; k, v only receive their gradient here."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tile_pass: TilePass, seen: Seen) -> Tensor:
        saved = None if tile_pass.saved_attention is None else tile_pass.saved_attention.take(tile_pass.index)
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
