"""Tile attention in plain torch: any device, dtype, soft cap and head dimension; what other backends are held against.

Softmax over a row can be summed block by block when its running maximum is kept (Milakov and Gimelshein, 2018), and its
gradient for any block of keys needs only the row's log-sum-exp and ``rowsum(grad_out * out)`` (Dao et al.,
FlashAttention, 2022, section 3). So scores exist for one block of queries against one block of keys at a time, whatever
the length. Keys and values are never repeated for grouped query attention: the query heads that share one are laid side
by side as rows.

All sums run in float32 (float64 for float64). It is not fast; it is the definition made bounded in memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from longfit.attention.tile import QueryTile

QUERY_BLOCK = 512
"""Queries whose scores exist at once."""

SCORE_ELEMENTS = 1 << 24
"""Scores that exist at once, over all rows and heads: 64 MiB in float32, and a few temporaries of that size."""


def forward(tile: QueryTile) -> tuple[Tensor, Tensor]:
    """See ``backends.tile_forward``."""
    q, k, v = tile.q, tile.k, tile.v
    out, lse = tile.empty_results()  # [B, H, t, D], [B, H, t]
    for low, high in _blocks(0, q.shape[2], QUERY_BLOCK):
        rows = _rows(tile, q[:, :, low:high])  # [B, K, R*Q, D]
        first, last = _visible_range(tile, low, high)  # [B, K, R*Q], [R*Q]
        largest = rows.new_full((*rows.shape[:-1], 1), float("-inf"))
        total = rows.new_zeros(largest.shape)
        weighted = rows.new_zeros(*rows.shape[:-1], v.shape[-1])
        for key_low, key_high in _key_blocks(first, tile.start + high, rows):
            scores = _scores(tile, rows, k[:, :, key_low:key_high])  # [B, K, R*Q, S]
            scores.masked_fill_(_hidden(first, last, key_low, key_high), float("-inf"))
            new_largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
            finite = new_largest.clamp_min(torch.finfo(rows.dtype).min)  # a row may still be all hidden
            weights = scores.sub_(finite).exp_()
            rescale = (largest - finite).exp_()
            total = total * rescale + weights.sum(-1, keepdim=True)
            weighted = weighted * rescale + weights @ v[:, :, key_low:key_high].to(rows.dtype)
            largest = new_largest
        out[:, :, low:high] = (weighted / total).reshape(out[:, :, low:high].shape)
        lse[:, :, low:high] = (largest + total.log()).reshape(lse[:, :, low:high].shape)
    return out, lse


def backward(tile: QueryTile, grad_out: Tensor, out: Tensor, lse: Tensor, *, grad_k: Tensor, grad_v: Tensor) -> Tensor:
    """See ``backends.tile_backward``."""
    q, k, v = tile.q, tile.k, tile.v
    grad_q = torch.empty_like(q)
    for low, high in _blocks(0, q.shape[2], QUERY_BLOCK):
        rows, grad_rows, out_rows = (_rows(tile, x[:, :, low:high]) for x in (q, grad_out, out))  # [B, K, R*Q, D]
        lse_rows = _rows(tile, lse[:, :, low:high, None])  # [B, K, R*Q, 1]
        delta = (grad_rows * out_rows).sum(-1, keepdim=True)  # [B, K, R*Q, 1]
        grad = torch.zeros_like(rows)
        first, last = _visible_range(tile, low, high)
        for key_low, key_high in _key_blocks(first, tile.start + high, rows):
            keys, values = (x[:, :, key_low:key_high].to(rows.dtype) for x in (k, v))  # [B, K, S, D]
            scores = _scores(tile, rows, keys)  # [B, K, R*Q, S]
            weights = (scores - lse_rows).exp_()
            weights.masked_fill_(_hidden(first, last, key_low, key_high), 0.0)
            grad_v[:, :, key_low:key_high] += weights.transpose(-1, -2) @ grad_rows
            grad_scores = (grad_rows @ values.transpose(-1, -2)).sub_(delta).mul_(weights).mul_(tile.scaling)
            if tile.softcap is not None:
                grad_scores *= 1 - (scores / tile.softcap).square_()  # the derivative of tanh
            grad += grad_scores @ keys
            grad_k[:, :, key_low:key_high] += grad_scores.transpose(-1, -2) @ rows
        grad_q[:, :, low:high] = grad.reshape(grad_q[:, :, low:high].shape)
    return grad_q


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Everything."""
    return None


def _blocks(low: int, high: int, size: int) -> Iterator[tuple[int, int]]:
    return ((block, min(block + size, high)) for block in range(low, high, size))


def _rows(tile: QueryTile, x: Tensor) -> Tensor:
    """[B, H, Q, D] -> [B, K, R*Q, D]: the R query heads of one key/value head side by side, in the dtype of sums."""
    return x.reshape(x.shape[0], tile.k.shape[1], -1, x.shape[-1]).to(tile.sum_dtype)


def _visible_range(tile: QueryTile, low: int, high: int) -> tuple[Tensor, Tensor]:
    """First visible key [B, K, R*Q] and last visible key [R*Q] of each row of the tile's queries [low, high)."""
    first = tile.first_key()[:, :, low:high]  # [C, B, Q]
    heads = torch.tensor(tile.schedule.head_bounds).diff().to(first.device)
    per_head = first.repeat_interleave(heads, dim=0, output_size=tile.q.shape[1]).transpose(0, 1)  # [B, H, Q]
    last = torch.arange(tile.start + low, tile.start + high, dtype=first.dtype, device=first.device)
    return per_head.reshape(per_head.shape[0], tile.k.shape[1], -1), last.repeat(tile.repeats)


def _key_blocks(first: Tensor, end: int, rows: Tensor) -> Iterator[tuple[int, int]]:
    num_rows = rows.shape[0] * rows.shape[1] * rows.shape[2]
    return _blocks(int(first.min()), end, max(16, SCORE_ELEMENTS // num_rows))


def _hidden(first: Tensor, last: Tensor, key_low: int, key_high: int) -> Tensor:
    """Bool [B, K, R*Q, S], of one block of keys only."""
    keys = torch.arange(key_low, key_high, dtype=first.dtype, device=first.device)
    return (keys < first[..., None]) | (keys > last[:, None])


def _scores(tile: QueryTile, rows: Tensor, keys: Tensor) -> Tensor:
    scores = (rows @ keys.to(rows.dtype).transpose(-1, -2)).mul_(tile.scaling)  # [B, K, R*Q, S]
    return scores if tile.softcap is None else scores.div_(tile.softcap).tanh_().mul_(tile.softcap)
