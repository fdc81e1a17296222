"""The two passes over the tiles of one layer. A pass gives, for each tile, what travels down as ``sweep=``.

    ForwardPass     tiles first to last
        ForwardTile     stores the tile's K, V; attends over all keys it sees
    BackwardPass    tiles last to first
        KeysTile        stores the tile's K, V and ends the layer's call: nothing after them is wanted
        GradientTile    attends with a graph; its backward adds to dK, dV of all keys the tile sees, and hands the
                        tile's own k, v their finished dK, dV
    either
        ProjectionTile  ends the layer's call with the tile's K, V, which the caller wants (``shared_sequence.py``)

Why finished: by causality only the queries of this tile and of later ones touch the keys of this tile, and the later
ones have been differentiated before. So one backward per tile closes its graph, and no graph outlives its tile.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longfit.attention.backends import sinks_grad, tile_backward, tile_forward
from longfit.attention.spec import AttentionSpec
from longfit.attention.tile import QueryTile
from longfit.attention.visibility import Schedule, keeps_own_structure
from longfit.engine.sweep.kv_window import KeyValueWindow
from longfit.engine.sweep.saved_attention import SavedAttention
from longfit.engine.sweep.shared_sequence import AttentionKind, KeysProjected, Stretch, num_tiles
from longfit.engine.sweep.visible_keys import VisibleKeys
from longfit.errors import ModelError


@dataclass(frozen=True)
class _SeenKeys:
    """The keys ``[low, end)`` that a tile sees, and what of the schedule concerns them, counted from ``low``."""

    low: int
    end: int
    key: Tensor  # [B, K, end - low, D]
    value: Tensor
    schedule: Schedule
    start: int  # the tile's first token, counted from low
    spec: AttentionSpec

    def tile(self, query: Tensor) -> QueryTile:
        """These keys and the tile's queries ``[B, H, t, D]``."""
        spec, keys = self.spec, (self.key, self.value)
        return QueryTile(query, *keys, self.schedule, self.start, spec.scaling, spec.softcap, spec.sinks)


def _spec_says_all(spec: AttentionSpec) -> bool:
    """Whether positions and window say as much as the mask, which covers the tokens of this process alone."""
    if spec.attention_mask is None:
        return True
    if spec.attention_mask.dim() == 2:
        return False
    return spec.sliding_window is not None or not keeps_own_structure(spec.attention_mask)


class _Pass:
    """What the passes share: which keys are visible, and the window of those that are stored.

    Attributes:
        stretch: the tokens to go over.
        visible: which keys each tile needs; None until the first tile of a forward pass has attended.
    """

    def __init__(self, stretch: Stretch, tile: int, position_ids: Tensor | None, visible: VisibleKeys | None) -> None:
        self.stretch, self.tile_size, self.visible = stretch, tile, visible
        self._position_ids = position_ids  # of the whole sequence: a tile is given its own
        self._schedule: Schedule | None = None
        self._stored: KeyValueWindow | None = None
        self._like: tuple[Tensor, Tensor] | None = None  # no keys and values, where others have a part of the sequence
        self._halo: tuple[Tensor, Tensor] | None = None  # beside the window, where that moves over it
        self._halo_missing = 0  # tokens of the halo that are not in the window yet: those before this number

    @property
    def num_tiles(self) -> int:
        """Tiles of the stretch."""
        return num_tiles(self.stretch, self.tile_size)

    def number(self, index: int) -> int:
        """The number of a tile among those of all stretches."""
        return self.stretch.first_tile + index

    def span(self, index: int) -> tuple[int, int]:
        """First token of a tile, and the one after its last, among the tokens of this process."""
        start = self.stretch.start + index * self.tile_size
        return start, min(start + self.tile_size, self.stretch.start + self.stretch.num_tokens)

    def visible_keys(self, *, attends: bool) -> VisibleKeys:
        """Which keys each tile has needed, when all tiles are through."""
        if not attends:
            return VisibleKeys.of_no_attention(self.stretch.num_tokens, self.tile_size)
        assert self.visible is not None, "a layer that has not attended"
        return self.visible

    def begin_with_halo(self, schedule: Schedule, halo: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Begin with a halo; returns where its keys and values belong, ``[B, K, halo, D]``, zero so far.

        Where every tile sees all of the halo, that is the window itself, so that it is held once.

        Args:
            schedule: what the tokens see, numbered from the first of the halo.
            halo: tokens.
            like: keys and values of some tokens.
        """
        self._schedule, self._like = schedule, (like[0][:, :, :0].clone(), like[1][:, :, :0].clone())
        self.visible = self.visible or VisibleKeys.of(schedule, self.tile_size, halo=halo)
        if halo and self.visible.capacity == self.visible.num_tokens:
            self._stored = KeyValueWindow(*like, capacity=self.visible.num_tokens)
            self._stored.move(0, halo)
            places = self._stored.tokens(0, halo)
            for place in places:
                place.zero_()
            return places
        key, value = (x.new_zeros(*x.shape[:2], halo, x.shape[3]) for x in like)
        self._halo, self._halo_missing = (key, value), halo
        return key, value

    def release(self) -> None:
        """Hold no keys any more: all tiles have been gone over."""
        self._stored = self._halo = None

    def projection_tile(self, index: int) -> "ProjectionTile":
        """Turn to a tile whose keys and values the caller wants."""
        return ProjectionTile(self, index)

    def schedule(self, query: Tensor, spec: AttentionSpec) -> Schedule:
        """What every token sees, made at the first call unless a halo has brought it."""
        if self._like is not None and not _spec_says_all(spec):
            raise ModelError("a padding mask and a window shared by processes do not go together: pad with labels -100")
        if self._schedule is None:
            whole = spec.with_positions(None if spec.position_ids is None else self._position_ids)
            batch, num_heads = query.shape[:2]
            self._schedule = whole.schedule(batch, num_heads, self.stretch.num_tokens, query.device)
        return self._schedule

    def _put(self, index: int, key: Tensor, value: Tensor) -> None:
        """Put the keys and values of a tile in the window, which has been moved there."""
        assert self._stored is not None and self.visible is not None  # noqa: PT018
        for place, tile in zip(self._stored.tokens(*self.visible.span(index)), (key, value), strict=True):
            place.copy_(tile.detach())

    def _move(self, low: int, high: int) -> None:
        """Turn the window of keys to a range, and put in what newly belongs to it of the halo."""
        assert self._stored is not None
        self._stored.move(low, high)
        if self._halo is not None and low < self._halo_missing:
            new = slice(low, min(self._halo_missing, high))
            for place, halo in zip(self._stored.tokens(new.start, new.stop), self._halo, strict=True):
                place.copy_(halo[:, :, new])
            self._halo_missing = low

    def _seen(self, index: int, schedule: Schedule, spec: AttentionSpec) -> _SeenKeys:
        """The keys that a tile sees, all of which are stored."""
        assert self.visible is not None and self._stored is not None  # noqa: PT018
        (low, end), start = self.visible.keys_of(index), self.visible.span(index)[0]
        if low:
            schedule = schedule.since(low, end)
        return _SeenKeys(low, end, *self._stored.tokens(low, end), schedule, start - low, spec)


class ForwardPass(_Pass):
    """All tiles first to last."""

    def __init__(
        self, stretch: Stretch, tile: int, position_ids: Tensor | None = None, *, saved: SavedAttention | None = None
    ) -> None:
        """Begin.

        Args:
            stretch, tile: the tokens to go over, and tokens per tile.
            position_ids: ``[B or 1, T]`` of the whole sequence, as the layer is given them; None without.
            saved: where attention is left for backward; None saves nothing.
        """
        super().__init__(stretch, tile, position_ids, None)
        self._saved = saved

    def tile(self, index: int) -> "ForwardTile":
        """Turn to a tile."""
        return ForwardTile(self, index)

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        """Store a tile's k, v ``[B, K, t, D]`` and attend from its q ``[B, H, t, D]``; returns ``[B, H, t, D]``."""
        schedule = self.schedule(query, spec)
        self.visible = self.visible or VisibleKeys.of(schedule, self.tile_size)
        if self._stored is None:
            self._stored = KeyValueWindow(key, value, capacity=self.visible.capacity)
        self._move(*self.visible.keys_of(index))
        self._put(index, key, value)
        out, lse = tile_forward(self._seen(index, schedule, spec).tile(query))
        if self._saved is not None:
            self._saved.put(self.number(index), out, lse)
        return out


class BackwardPass(_Pass):
    """All tiles last to first, each differentiated once; the keys it needs are stored before."""

    def __init__(
        self,
        stretch: Stretch,
        tile: int,
        visible: VisibleKeys,
        position_ids: Tensor | None = None,
        *,
        saved: SavedAttention | None = None,
    ) -> None:
        """Begin.

        Args:
            stretch, tile, position_ids: those of the forward pass.
            visible: what it found.
            saved: where it left attention; None computes it again.
        """
        super().__init__(stretch, tile, position_ids, visible)
        self._visible = visible
        self._saved = saved
        self._sums: KeyValueWindow | None = None

    def needed(self, index: int) -> range:
        """Make way for the keys that a tile sees; returns the tiles whose keys must be stored before its turn."""
        if self._stored is not None:
            self._move(*self._visible.keys_of(index))
        return self._visible.new_tiles(index)

    def keys_tile(self, index: int) -> "KeysTile":
        """Turn to a tile whose keys are to be stored."""
        return KeysTile(self, index)

    def gradient_tile(self, index: int) -> "GradientTile":
        """Turn to a tile that is to be differentiated."""
        return GradientTile(self, index)

    def store(self, index: int, key: Tensor, value: Tensor) -> None:
        """Store a tile's k, v ``[B, K, t, D]`` in the window, which begins at the end of the sequence."""
        if self._stored is None:
            self._stored = KeyValueWindow(key, value, capacity=self._visible.capacity)
            self._move(self._visible.lows[-1], self._visible.num_tokens)
        self._put(index, key, value)

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        """Attend with a graph from a tile's q, whose k, v are stored too; returns ``[B, H, t, D]``."""
        schedule = self.schedule(query, spec)
        self.store(index, key, value)
        out: Tensor = _TileAttention.apply(
            query, key, value, spec.sinks, self, index, self._seen(index, schedule, spec)
        )
        return out

    def saved(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Attention of a tile as forward left it, once; None if it must be computed again."""
        return None if self._saved is None else self._saved.take(self.number(index))

    def gradient_sums(self, seen: _SeenKeys, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Running dK, dV of the keys that a tile sees, each ``[B, K, n, D]``; newly seen keys begin at zero."""
        if self._sums is None:
            self._sums = KeyValueWindow(seen.key, seen.value, capacity=self._visible.capacity, dtype=dtype)
            self._sums.low = self._sums.high = self._visible.num_tokens
        known = self._sums.low
        self._sums.move(seen.low, seen.end)
        for new in self._sums.tokens(seen.low, max(seen.low, min(known, seen.end))):
            new.zero_()
        return self._sums.tokens(seen.low, seen.end)

    def halo_gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of the halo's keys and values, ``[B, K, n, D]``, once, when all tiles are differentiated."""
        assert self._like is not None
        self.release()
        halo, seen_from = self._visible.halo, self._visible.lows[0]
        key, value = (x.new_zeros(*x.shape[:2], halo, x.shape[3]) for x in self._like)
        if self._sums is not None and seen_from < halo:  # without sums nothing before attention trains
            for total, part in zip((key, value), self._sums.tokens(seen_from, halo), strict=True):
                total[:, :, seen_from:] = part
        self._sums = None
        return key, value


class SweptTile:
    """A layer's turn at one tile: what its attention is called with as ``sweep=``.

    Attributes:
        index: of the tile in its stretch.
        span: first token of the tile, and the one after its last, among the tokens of this process.
        attended: whether the layer has called attention.
    """

    def __init__(self, tiles: _Pass, index: int) -> None:
        self.index, self.span, self.attended = index, tiles.span(index), False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        """Do what this tile is for with q ``[B, H, t, D]``, k and v ``[B, K, t, D]``; returns ``[B, t, H, D]``.

        Raises: ModelError: the layer attends more than once, or with other tokens than the tile's. KeysProjected: only
            the keys and values were wanted.
        """
        start, end = self.span
        if self.attended:
            raise ModelError("a swept layer attends more than once; call disable_sweep(model) to train it plainly")
        self.attended = True
        if query.shape[2] != end - start or key.shape[2] != end - start:
            raise ModelError(
                f"a tile of {end - start} tokens attends with {query.shape[2]} queries and {key.shape[2]} keys: the"
                " layer adds tokens of its own, or a key/value cache is on; train with use_cache=False"
            )
        return self._attend(query, key, value, spec).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        raise NotImplementedError


class ForwardTile(SweptTile):
    """A tile of the forward pass."""

    def __init__(self, forward: ForwardPass, index: int) -> None:
        super().__init__(forward, index)
        self._pass = forward

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        return self._pass.attend(self.index, query, key, value, spec)


class GradientTile(SweptTile):
    """A tile of the backward pass that is differentiated."""

    def __init__(self, backward: BackwardPass, index: int) -> None:
        super().__init__(backward, index)
        self._pass = backward

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        return self._pass.attend(self.index, query, key, value, spec)


class ProjectionTile(SweptTile):
    """A tile of which only the keys and values are wanted."""

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        raise KeysProjected(
            key, value, AttentionKind(query.shape[1], key.shape[1], spec.group_size, spec.sliding_window)
        )


class KeysTile(ProjectionTile):
    """A tile of the backward pass whose keys a later one needs."""

    def __init__(self, backward: BackwardPass, index: int) -> None:
        super().__init__(backward, index)
        self._pass = backward

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        self._pass.store(self.index, key, value)
        return super()._attend(query, key, value, spec)


class _TileAttention(torch.autograd.Function):
    """Attention of a tile whose keys and values lie in the pass's window; k, v only receive their gradient here."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        backward: BackwardPass,
        index: int,
        seen: _SeenKeys,
    ) -> Tensor:
        out, lse = backward.saved(index) or tile_forward(seen.tile(query))
        ctx.save_for_backward(query, out, lse, sinks)
        ctx.backward_pass, ctx.seen, ctx.dtypes = backward, seen, (key.dtype, value.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, out, lse, sinks = ctx.saved_tensors
        seen: _SeenKeys = ctx.seen
        sums = ctx.backward_pass.gradient_sums(seen, lse.dtype)
        grad_query = tile_backward(seen.tile(query), grad_out, out, lse, grad_k=sums[0], grad_v=sums[1])
        own = slice(seen.start, None)
        finished = (total[:, :, own].to(dtype, copy=True) for total, dtype in zip(sums, ctx.dtypes, strict=True))
        grad_sinks = sinks_grad(grad_out, out, lse, sinks).to(sinks.dtype) if ctx.needs_input_grad[3] else None
        return grad_query, *finished, grad_sinks, None, None, None
