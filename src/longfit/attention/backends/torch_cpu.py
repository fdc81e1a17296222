"""Tile attention through torch's CPU flash kernel, which takes and returns the log-sum-exp.

The kernel knows three shapes of visibility: everything, the causal square (aligned top-left), and an additive mask. A
schedule is cut into pieces of these. Queries that share their first key see a rectangle of earlier keys and their own
causal square; the two results are merged by their log-sum-exp, and the backward needs no merging, because gradients of
parts add up when each is given the log-sum-exp of the whole row (Dao et al., FlashAttention, 2022, section 3). Runs of
queries too short for that (sliding windows, tiny documents) share one small mask of at most ``MASK_BLOCK`` queries.

Keys and values are not repeated: a class of heads that cuts through a key/value head is called in up to three parts.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from longfit.attention.tile import QueryTile, rows_contiguous
from longfit.attention.varlen import shared_heads
from longfit.compat.torch import flash_cpu_backward, flash_cpu_forward

SHORT_RUN = 32
"""Below so many queries with one first key, calls of their own cost more than a share in a masked block: for documents
of 16 tokens, 1,024 queries took 0.11 s forward and backward on their own and 0.08 s shared; for 64, the reverse."""

MASK_BLOCK = 128
"""Queries that share a mask. For a window of 512, blocks of 64, 128 and 256 took the same time and 512 twice that; no
more than half of the plain torch backend's time, and two thirds of it for a window of 4,096."""


class KeyRange(NamedTuple):
    """Keys ``[low, high)`` that one call of the kernel shows to a piece's queries: all, causally, or by mask."""

    low: int
    high: int
    visible: str  # "all" | "causal" | "mask"


class QueryRange(NamedTuple):
    """Queries ``[low, high)`` of the whole sequence and the parts that together show them their keys."""

    low: int
    high: int
    parts: tuple[KeyRange, ...]


class Call(NamedTuple):
    """A piece for some rows of the batch and some heads."""

    rows: slice
    heads: slice
    kv_heads: slice
    first_key: Tensor  # [t] of the whole tile
    piece: QueryRange

    def queries(self, start: int) -> tuple[slice, slice, slice]:
        """Where its queries are: an index of ``[B, H, t, D]``."""
        return self.rows, self.heads, slice(self.piece.low - start, self.piece.high - start)

    def keys(self, part: KeyRange) -> tuple[slice, slice, slice]:
        """Where the keys of one of its parts are: an index of ``[B, K, n, D]``."""
        return self.rows, self.kv_heads, slice(part.low, part.high)


def forward(tile: QueryTile) -> tuple[Tensor, Tensor]:
    """See ``backends.tile_forward``."""
    tile = tile.rows_contiguous()
    q, k, v = tile.q, tile.k, tile.v
    out, lse = tile.empty_results()  # [B, H, t, D], [B, H, t]
    for call in _calls(tile):
        here = call.queries(tile.start)
        for number, part in enumerate(call.piece.parts):
            there = call.keys(part)
            mask = _mask(call, part, tile)
            causal = part.visible == "causal"
            part_out, part_lse = flash_cpu_forward(
                q[here], k[there], v[there], 0.0, causal, attn_mask=mask, scale=tile.scaling
            )
            if number:
                part_out, part_lse = _merge(out[here], lse[here], part_out, part_lse)
            out[here], lse[here] = part_out, part_lse
    return out, lse


def backward(tile: QueryTile, grad_out: Tensor, out: Tensor, lse: Tensor, *, grad_k: Tensor, grad_v: Tensor) -> Tensor:
    """See ``backends.tile_backward``."""
    tile = tile.rows_contiguous()
    q, k, v = tile.q, tile.k, tile.v
    grad_out, out = rows_contiguous(grad_out), rows_contiguous(out)
    grad_q = torch.empty_like(q)
    for call in _calls(tile):
        here = call.queries(tile.start)
        shares = []
        for part in call.piece.parts:
            there = call.keys(part)
            part_q, part_k, part_v = flash_cpu_backward(
                grad_out[here], q[here], k[there], v[there], out[here], lse[here], 0.0, part.visible == "causal",
                attn_mask=_mask(call, part, tile), scale=tile.scaling,
            )  # fmt: skip
            grad_k[there] += part_k
            grad_v[there] += part_v
            shares.append(part_q)
        grad_q[here] = torch.stack(shares).sum(0, dtype=lse.dtype)
    return grad_q


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why the kernel cannot take this call; None when it can."""
    if q.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {q.device.type}"
    if v.shape[-1] != q.shape[-1]:
        return f"values of {v.shape[-1]} dimensions must be as wide as queries, {q.shape[-1]}"
    return None


def pieces(first_key: Tensor, start: int) -> Iterator[QueryRange]:
    """Cut a tile into pieces; every query is in exactly one.

    Args:
        first_key: int ``[t]`` on the CPU, of the queries ``start .. start + t``.
        start: of the tile.
    """
    firsts, counts = torch.unique_consecutive(first_key, return_counts=True)
    low = start
    block: list[tuple[int, int, int]] = []  # short runs (first key, low, high) waiting to share a mask
    for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
        high = low + count
        full = block and (high - block[0][1] > MASK_BLOCK or first - block[0][0] > MASK_BLOCK)
        if count >= SHORT_RUN or full:
            yield from _shared(block)
            block = []
        if count >= SHORT_RUN:
            yield _run(first, low, high)
        else:
            block.append((first, low, high))
        low = high
    yield from _shared(block)


def _shared(block: list[tuple[int, int, int]]) -> Iterator[QueryRange]:
    if len(block) == 1:
        yield _run(*block[0])
    elif block:
        low, high = block[0][1], block[-1][2]
        yield QueryRange(low, high, (KeyRange(block[0][0], high, "mask"),))


def _run(first: int, low: int, high: int) -> QueryRange:
    if high - low == 1:
        return QueryRange(low, high, (KeyRange(first, high, "all"),))
    square = KeyRange(low, high, "causal")
    return QueryRange(low, high, (KeyRange(first, low, "all"), square) if first < low else (square,))


def _calls(tile: QueryTile) -> Iterator[Call]:
    classes = zip(pairwise(tile.schedule.head_bounds), tile.first_key(), strict=True)
    for (low, high), first_key in classes:  # first_key [B, t]
        alike = bool((first_key == first_key[:1]).all())
        for row in range(1 if alike else first_key.shape[0]):
            rows = slice(None) if alike else slice(row, row + 1)
            for piece in pieces(first_key[row], tile.start):
                for heads, kv_heads in shared_heads(low, high, tile.repeats):
                    yield Call(rows, heads, kv_heads, first_key[row], piece)


def _mask(call: Call, part: KeyRange, tile: QueryTile) -> Tensor | None:
    """Additive mask [1, 1, Q, S]; the kernel reads it in the dtype of the queries."""
    if part.visible != "mask":
        return None
    first = call.first_key[call.piece.low - tile.start : call.piece.high - tile.start, None]
    keys = torch.arange(part.low, part.high)
    queries = torch.arange(call.piece.low, call.piece.high)[:, None]
    hidden = (keys < first) | (keys > queries)
    return torch.zeros(hidden.shape, dtype=tile.q.dtype).masked_fill_(hidden, float("-inf"))[None, None]


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over different keys as one over both."""
    both = torch.logaddexp(lse, other_lse)
    share, other_share = (lse - both).exp_()[..., None], (other_lse - both).exp_()[..., None]
    return out * share + other * other_share, both
