"""Tile attention on CUDA by torch's flash kernels (Dao, FlashAttention-2, 2023), which take and return log-sum-exp.

    forward     one variable-length call for each class of heads: its sequences share their keys' memory, end to end
    backward    earlier keys in blocks, then the causal squares of all sequences in one call

Why blocks: the kernel returns the gradients of all keys it is given, and for grouped queries first makes them once per
query head. Given the log-sum-exp of the whole row, the gradients of any block of keys are exact by themselves, so they
are added to the running sums a block at a time and cost the same memory at any length.

Keys and values are neither repeated nor copied: a class that cuts through a key/value head is called in up to three
parts, and heads-major storage is passed as it lies, by its strides.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention.limits import KEY_BLOCK
from longfit.attention.tile import QueryTile, rows_contiguous
from longfit.attention.varlen import Sequence, Share, shares
from longfit.compat.torch import flash_backward, flash_forward


@dataclass(frozen=True)
class _Call:
    """One call for queries ``[low, high)`` and keys ``[first, end)``, each cut into sequences at its bounds."""

    low: int
    high: int
    first: int
    end: int
    query_bounds: list[int]
    key_bounds: list[int]
    causal: bool
    window: int | None

    def sizes(self, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
        """The arguments that say where sequences begin: on the device without waiting for it, and the longest."""
        bounds = torch.tensor([self.query_bounds, self.key_bounds], dtype=torch.int32)
        longest = bounds.diff(dim=1).amax(dim=1).tolist()
        queries, keys = bounds.to(device, non_blocking=True)
        return queries, keys, *longest

    @property
    def options(self) -> dict[str, int]:
        """The window, as the kernel counts it: keys to the left of the query; -1 is no limit."""
        return {
            "window_size_left": -1 if self.window is None else self.window,
            "window_size_right": 0 if self.causal else -1,
        }


def forward(tile: QueryTile) -> tuple[Tensor, Tensor]:
    """See ``backends.tile_forward``."""
    tile = tile.rows_contiguous()
    q, k, v = tile.q, tile.k, tile.v
    out, lse = tile.empty_results()  # [B, H, t, D], [B, H, t]
    for share in shares(tile):
        for call in _whole_calls(share.sequences):
            here, there = _places(share, call, tile.start)
            queries, keys, *longest = call.sizes(q.device)
            part, part_lse, *_ = flash_forward(
                _packed(q[here]), _packed(k[there]), _packed(v[there]), queries, keys, *longest, 0.0, call.causal,
                False, scale=tile.scaling, **call.options,
            )  # fmt: skip
            out[here], lse[here] = part.transpose(0, 1), part_lse
    return out, lse


def backward(tile: QueryTile, grad_out: Tensor, out: Tensor, lse: Tensor, *, grad_k: Tensor, grad_v: Tensor) -> Tensor:
    """See ``backends.tile_backward``."""
    tile = tile.rows_contiguous()
    q, k, v = tile.q, tile.k, tile.v
    grad_out, out = rows_contiguous(grad_out), rows_contiguous(out)
    grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    seed, unused = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in (2, 0))  # of dropout: none
    for share in shares(tile):
        for call in _block_calls(share.sequences):
            here, there = _places(share, call, tile.start)
            queries, keys, *longest = call.sizes(q.device)
            part_q, part_k, part_v = flash_backward(
                _packed(grad_out[here]), _packed(q[here]), _packed(k[there]), _packed(v[there]), _packed(out[here]),
                lse[here].contiguous(), queries, keys, *longest, 0.0, call.causal, seed, unused,
                scale=tile.scaling, **call.options,
            )  # fmt: skip
            grad_q[here] += part_q.transpose(0, 1)
            grad_k[there] += part_k.transpose(0, 1)
            grad_v[there] += part_v.transpose(0, 1)
    return grad_q.to(q.dtype)


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why the kernel cannot take this call; None when it can."""
    if q.device.type != "cuda":
        return f"it runs on CUDA, the tensors are on {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in 16 bits, the tensors are in {q.dtype}"
    head_dim = q.shape[-1]
    if v.shape[-1] != head_dim:
        return f"values of {v.shape[-1]} dimensions must be as wide as queries, {head_dim}"
    if head_dim % 8 or head_dim > 256 or 192 < head_dim <= 224:
        return f"it takes heads of up to 192 dimensions, and 232 to 256, in steps of 8; these have {head_dim}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch is built without it"
    capability = torch.cuda.get_device_capability(q.device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, the card has {capability[0]}.{capability[1]}"
    return None


def _whole_calls(cut: list[Sequence]) -> Iterator[_Call]:
    """Yield calls with all keys of their queries: sequences whose keys follow each other go together."""
    group: list[Sequence] = []
    for sequence in cut:
        if group and not _follows(group[-1], sequence, group[0].window):
            yield _call_of(group)
            group = []
        group.append(sequence)
    yield _call_of(group)


def _follows(before: Sequence, after: Sequence, window: int | None) -> bool:
    return after.first == before.high and after.window == window


def _call_of(group: list[Sequence]) -> _Call:
    low, first = group[0].low, group[0].first
    query_bounds = [0, *(sequence.high - low for sequence in group)]
    key_bounds = [0, *(sequence.high - first for sequence in group)]
    return _Call(low, group[-1].high, first, group[-1].high, query_bounds, key_bounds, True, group[0].window)


def _block_calls(cut: list[Sequence]) -> Iterator[_Call]:
    """Yield calls of which none has many more keys than queries: earlier keys in blocks, then what is left."""
    rest = []
    for sequence in cut:
        if sequence.window is not None:  # its keys are few, and not all of them are visible to all queries
            rest.append(sequence)
            continue
        low, high = sequence.low, sequence.high
        for first in range(sequence.first, low, KEY_BLOCK):
            end = min(first + KEY_BLOCK, low)
            yield _Call(low, high, first, end, [0, high - low], [0, end - first], False, None)
        rest.append(Sequence(low, high, low))
    yield from _whole_calls(rest)


def _places(share: Share, call: _Call, start: int) -> tuple[tuple[int, slice, slice], tuple[int, slice, slice]]:
    """Where the queries and the keys of a call are: indices of ``[B, H, t, D]`` and ``[B, K, n, D]``."""
    here = (share.row, share.heads, slice(call.low - start, call.high - start))
    return here, (share.row, share.kv_heads, slice(call.first, call.end))


def _packed(x: Tensor) -> Tensor:
    """[H, t, D] -> [t, H, D], a view."""
    return x.transpose(0, 1)
