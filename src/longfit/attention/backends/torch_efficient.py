"""Tile attention on CUDA through torch's memory-efficient kernels (Rabe and Staats, 2021; xFormers' CUTLASS kernels).

For what flash does not take: cards before Ampere (T4, RTX 20), float32, and any dimension per head. It is called once
for each sequence and each of the query heads that share a key/value head, so that keys and values are not repeated.
Backward takes earlier keys in blocks, as ``torch_flash.py`` explains.

The rare layers with a sliding window, whose meaning in this kernel is undocumented, are computed by the reference.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from longfit.attention.backends import reference
from longfit.attention.limits import KEY_BLOCK
from longfit.attention.tile import QueryTile, rows_contiguous
from longfit.attention.varlen import Sequence, Share, shares
from longfit.attention.visibility import Schedule
from longfit.compat.torch import efficient_backward, efficient_forward

EVERYTHING, CAUSAL = 0, 2
"""The kernel's mask types: none, and causal with the last query aligned to the last key."""

LSE_MULTIPLE = 32
"""The kernel stores a row of log-sum-exps in a multiple of so many numbers and wants it back like that."""


def forward(tile: QueryTile) -> tuple[Tensor, Tensor]:
    """See ``backends.tile_forward``."""
    tile = tile.rows_contiguous()
    q, k, v = tile.q, tile.k, tile.v
    out, lse = tile.empty_results()  # [B, H, t, D], [B, H, t]
    for share, sequence in _pairs(tile):
        if sequence.window is not None:
            queries, _ = _places(share, sequence, tile.start)
            out[queries], lse[queries] = reference.forward(_alone(tile, share, sequence))
            continue
        there = (share.row, share.kv_heads, slice(sequence.first, sequence.high))
        for here in _one_per_key_head(share, sequence, tile.start):
            part, part_lse, *_ = efficient_forward(
                _batched(q[here]), _batched(k[there]), _batched(v[there]), None, None, None, None, None, 0.0, CAUSAL,
                compute_log_sumexp=True, scale=tile.scaling,
            )  # fmt: skip
            out[here], lse[here] = part[0].transpose(0, 1), part_lse[0, :, : sequence.high - sequence.low]
    return out, lse


def backward(tile: QueryTile, grad_out: Tensor, out: Tensor, lse: Tensor, *, grad_k: Tensor, grad_v: Tensor) -> Tensor:
    """See ``backends.tile_backward``."""
    tile = tile.rows_contiguous()
    q, k, v = tile.q, tile.k, tile.v
    grad_out, out = rows_contiguous(grad_out), rows_contiguous(out)
    grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in "so")  # of dropout: none
    for share, sequence in _pairs(tile):
        if sequence.window is not None:
            queries, keys = _places(share, sequence, tile.start)
            grad_q[queries] += reference.backward(
                _alone(tile, share, sequence), grad_out[queries], out[queries], lse[queries],
                grad_k=grad_k[keys], grad_v=grad_v[keys],
            )  # fmt: skip
            continue
        for here in _one_per_key_head(share, sequence, tile.start):
            filled_lse = _filled_up(lse[here])
            for first, end, mask in _key_blocks(sequence):
                there = (share.row, share.kv_heads, slice(first, end))
                part_q, part_k, part_v, _ = efficient_backward(
                    _batched(grad_out[here]), _batched(q[here]), _batched(k[there]), _batched(v[there]), None,
                    _batched(out[here]), None, None, sequence.high - sequence.low, end - first, filled_lse, 0.0, seed,
                    offset, mask, False, scale=tile.scaling,
                )  # fmt: skip
                grad_q[here] += part_q[0].transpose(0, 1)
                grad_k[there] += part_k[0].transpose(0, 1)
                grad_v[there] += part_v[0].transpose(0, 1)
    return grad_q.to(q.dtype)


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why the kernel cannot take this call; None when it can."""
    if q.device.type != "cuda":
        return f"it runs on CUDA, the tensors are on {q.device.type}"
    if torch.version.hip is not None:
        return "it is not made for this build of torch (ROCm)"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in 16 or 32 bits, the tensors are in {q.dtype}"
    if q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the card has no bfloat16"
    multiple = 16 // q.element_size()
    if q.shape[-1] % multiple or v.shape[-1] % multiple:
        return f"it takes heads of a multiple of {multiple} dimensions, these have {q.shape[-1]} and {v.shape[-1]}"
    return None


def _pairs(tile: QueryTile) -> Iterator[tuple[Share, Sequence]]:
    for share in shares(tile):
        for sequence in share.sequences:
            yield share, sequence


def _places(share: Share, sequence: Sequence, start: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where the queries and the keys of a sequence are: indices of ``[B, H, t, D]`` and ``[B, K, n, D]``."""
    row = slice(share.row, share.row + 1)
    here = (row, share.heads, slice(sequence.low - start, sequence.high - start))
    return here, (row, share.kv_heads, slice(sequence.first, sequence.high))


def _one_per_key_head(share: Share, sequence: Sequence, start: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield indices of ``[B, H, t, D]``, each with one query head for every key/value head of the share."""
    repeats = (share.heads.stop - share.heads.start) // (share.kv_heads.stop - share.kv_heads.start)
    for number in range(repeats):
        heads = slice(share.heads.start + number, share.heads.stop, repeats)
        yield share.row, heads, slice(sequence.low - start, sequence.high - start)


def _key_blocks(sequence: Sequence) -> Iterator[tuple[int, int, int]]:
    """Yield (first, end, mask type): earlier keys in blocks, then the causal square."""
    for first in range(sequence.first, sequence.low, KEY_BLOCK):
        yield first, min(first + KEY_BLOCK, sequence.low), EVERYTHING
    yield sequence.low, sequence.high, CAUSAL


def _alone(tile: QueryTile, share: Share, sequence: Sequence) -> QueryTile:
    """One sequence with a window as a tile of its own, numbered from its first key."""
    assert sequence.window is not None
    token = torch.arange(sequence.high - sequence.first, dtype=torch.int32)
    first_key = (token - sequence.window).clamp_(min=0)[None, None]
    num_heads = share.heads.stop - share.heads.start
    schedule = Schedule(first_key.to(tile.q.device, non_blocking=True), (0, num_heads), first_key)
    queries, keys = _places(share, sequence, tile.start)
    return QueryTile(tile.q[queries], tile.k[keys], tile.v[keys], schedule, sequence.low - sequence.first, tile.scaling)


def _filled_up(lse: Tensor) -> Tensor:
    """[H, t] -> [1, H, t filled up] with infinity: queries that are not there give everything no weight."""
    missing = -lse.shape[-1] % LSE_MULTIPLE
    return torch.nn.functional.pad(lse, (0, missing), value=float("inf"))[None].contiguous()


def _batched(x: Tensor) -> Tensor:
    """[H, t, D] -> [1, t, H, D], a view."""
    return x.transpose(0, 1)[None]
