"""A tile of queries as sequences, each of which attends causally to one run of keys: what flash kernels take.

    queries  [low, high)
    keys     [first, high)      the last query sees the last key ("bottom-right" causal)
    window   None, or: query t sees no key before t - window

Exact attention is one sequence; each packed document, each group of shifted attention is one more. So shifted attention
needs no roll and no mask: two classes of heads are called with different boundaries.

Unlike the pieces of ``torch_cpu.py``, made for a kernel that aligns causality top-left and is called on one
sequence at a time, sequences keep the earlier keys and the causal square together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longfit.attention.tile import QueryTile

MAX_ELEMENTS = 2**31 - 1
"""Of a tensor that a kernel is given: some count them in 32 bits."""


@dataclass(frozen=True)
class Sequence:
    """Queries ``[low, high)`` and their keys ``[first, high)``, numbered as in the whole sequence of tokens."""

    low: int
    high: int
    first: int
    window: int | None = None


def sequences(first_key: Tensor, start: int) -> list[Sequence]:
    """Cut a tile into as few sequences as possible; every query is in exactly one.

    Args:
        first_key: integer ``[t]`` on the CPU, of the queries ``start .. start + t``; never decreases.
        start: of the tile.
    """
    num_queries = first_key.numel()
    token = torch.arange(start, start + num_queries)
    step = first_key.diff().to(torch.int64)  # [t - 1], from each query to the next
    begins = torch.ones(num_queries, dtype=torch.bool)
    # A document or group begins, or the range jumps; or it stands still after it had begun to slide.
    begins[1:] = (first_key[1:] == token[1:]) | (step > 1)
    begins[2:] |= (step[1:] == 0) & (step[:-1] == 1) & ~begins[1:-1]
    bounds = [*begins.nonzero().squeeze(1).tolist(), num_queries]
    found = []
    for low, high in pairwise(bounds):
        first, last = int(first_key[low]), int(first_key[high - 1])
        window = start + high - 1 - last if last > first else None
        found.append(Sequence(start + low, start + high, first, window))
    return found


@dataclass(frozen=True)
class Share:
    """Rows of the batch, query heads and the key/value heads they share, with one cut into sequences."""

    row: int
    heads: slice
    kv_heads: slice
    sequences: list[Sequence]


def shares(tile: QueryTile) -> Iterator[Share]:
    """Walk over all rows and heads of a tile; the keys of one share are at most ``MAX_ELEMENTS`` numbers."""
    repeats = tile.repeats
    max_kv_heads = max(1, MAX_ELEMENTS // (tile.k.shape[2] * tile.k.shape[3]))
    first_key = tile.schedule.host[:, :, tile.start : tile.end]  # [C, B, t]
    for number, (low, high) in enumerate(pairwise(tile.schedule.head_bounds)):
        for row in range(first_key.shape[1]):
            cut = sequences(first_key[number, row], tile.start)
            for heads, kv_heads in shared_heads(low, high, repeats):
                for begin in range(kv_heads.start, kv_heads.stop, max_kv_heads):
                    end = min(begin + max_kv_heads, kv_heads.stop)
                    part = slice(max(heads.start, begin * repeats), min(heads.stop, end * repeats))
                    yield Share(row, part, slice(begin, end), cut)


def shared_heads(low: int, high: int, repeats: int) -> Iterator[tuple[slice, slice]]:
    """Cut query heads [low, high) where whole groups of ``repeats`` begin and end; add the key/value heads of each."""
    whole_low, whole_high = -(-low // repeats) * repeats, high // repeats * repeats
    if whole_low > whole_high:  # inside one group
        bounds = [low, high]
    else:
        bounds = sorted({low, whole_low, whole_high, high})
    for a, b in pairwise(bounds):
        yield slice(a, b), slice(a // repeats, (b - 1) // repeats + 1)
