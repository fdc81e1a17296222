"""What a family's own mask lets each token see, read from its mask function instead of from its name or its config.

transformers hands every attention a mask *function* of (row, head, query, key), whatever the family does: causal,
windows, chunks (Llama-4), packed documents, and what models combine with them. longfit never builds the mask. As every
mask that it can compute lets a query see one range of keys that ends at itself, the first key of that range is found by
bisection, for all tokens at once, and says everything:

    read_mask(mask_function, ...)  ->  int32 [B, 1, T, 2]: first visible key, and 1 where the layer has a structure of
                                       its own (a window, chunks), which shifted attention leaves as it is

The heads' axis of one stands where transformers has it in its own masks, as models cut masks along the queries.
That the function is of this kind is checked: every pair of tokens of a short text, samples of a long one. A mask that
is not is refused, never approximated; but only by the layer that attends with it, as families make masks for kinds of
layers of which they have none (``unreadable``).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longfit.attention.visibility import document_starts

CHECKED_PAIRS = 1 << 16
"""Pairs of tokens whose visibility is compared with the range that was read; a text of 256 tokens is compared whole."""


def unreadable(read: Tensor) -> bool:
    """Whether a mask stands for one that is not a range of keys; it is int64 instead of int32."""
    return read.dim() == 4 and read.dtype == torch.int64


def read_mask(
    mask_function: Callable[..., Any],
    *,
    batch_size: int,
    num_queries: int,
    num_keys: int,
    key_offset: int = 0,
    padding: Tensor | None = None,
    num_heads: int = 1,
    own_structure: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Find the first key that each token sees.

    Args:
        mask_function: of transformers: (row, head, query, key) -> whether the key is visible, numbers being positions
            in the whole text.
        num_queries: tokens at the end of the keys that ask.
        num_keys: tokens that are there.
        key_offset: position of the first of them.
        padding: bool ``[B, num_keys]``, False for padding.
        num_heads: query heads; the first and the last must see the same.
        own_structure: that the layer has a window or chunks of its own.
        device: of the result.
    Returns: int32 ``[B, 1, num_keys, 2]``, counted from the first key; rows before the first query only honour padding.
        int64 if some query sees a later key, a range with holes, or less than the one before it.
    Raises: DataError: the padding has holes.
    """
    see = _Visible(mask_function, batch_size, key_offset, device)
    starts = document_starts(batch_size, num_keys, attention_mask=padding, device=device).to(torch.int64)
    queries = torch.arange(num_keys - num_queries, num_keys, device=device).expand(batch_size, -1)  # [B, Q]
    first = _first_visible(see, starts[:, num_keys - num_queries :], queries)
    if not _is_one_range(see, queries, first, padding, num_heads):
        return torch.stack([starts, starts], -1)[:, None]
    starts[:, num_keys - num_queries :] = first
    structure = torch.full_like(starts, int(own_structure))
    return torch.stack([starts, structure], -1)[:, None].to(torch.int32)


class _Visible:
    """A mask function over tensors of query and key numbers [B, ...], counted from the first key."""

    def __init__(
        self, function: Callable[..., Any], batch_size: int, offset: int, device: torch.device | str | None
    ) -> None:
        self._function, self._offset = function, offset
        self._rows = torch.arange(batch_size, device=device)

    def __call__(self, queries: Tensor, keys: Tensor, *, head: int = 0) -> Tensor:
        """Bool, of the shape of ``queries``."""
        rows = self._rows.view(-1, *[1] * (queries.dim() - 1)).expand(queries.shape)
        heads = torch.full_like(queries, head)
        seen = self._function(rows, heads, queries + self._offset, keys + self._offset)
        return torch.as_tensor(seen, device=queries.device).expand(queries.shape)


def _first_visible(see: _Visible, low: Tensor, queries: Tensor) -> Tensor:
    """Bisect for the smallest key in [low, query] that is visible, as all after it are; int64 [B, Q]."""
    high = queries.clone()
    low = low.clone()
    for _ in range(int(queries.max()).bit_length() + 1):
        middle = (low + high) // 2
        seen = see(queries, middle)
        high = torch.where(seen, middle, high)
        low = torch.where(seen, low, (middle + 1).minimum(high))
    return high


def _is_one_range(see: _Visible, queries: Tensor, first: Tensor, padding: Tensor | None, num_heads: int) -> bool:
    """Compare the ranges with the function: on all pairs if they are few, else on samples."""
    if bool((first[:, 1:] < first[:, :-1]).any()):
        return False
    batch, count = queries.shape
    end = int(queries[0, -1]) + 1
    if count * end <= CHECKED_PAIRS:
        asked, keys = queries[:, :, None].expand(-1, -1, end), torch.arange(end, device=queries.device)
        ranges, keys = first[:, :, None], keys.expand(batch, count, end)
    else:
        draw = torch.Generator().manual_seed(0)
        picked = torch.linspace(0, count - 1, 256).to(torch.int64).to(queries.device)
        asked, ranges = queries[:, picked, None].expand(-1, -1, 256), first[:, picked, None]
        keys = torch.randint(0, end, (batch, 256, 256), generator=draw).to(queries.device)
        near = torch.arange(-4, 4, device=queries.device)
        keys[..., :8] = (ranges + near).clamp(0, end - 1)
        keys[..., 8:16] = (asked[..., :1] + near).clamp(0, end - 1)
    expected = (keys >= ranges) & (keys <= asked)
    real = torch.ones_like(expected)
    if padding is not None:  # what padding sees does not matter, and nothing real sees it
        whole = padding.to(queries.device, torch.bool)
        rows = torch.arange(batch, device=queries.device)[:, None, None]
        real = whole[rows, asked] & whole[rows, keys]
    return not any(bool(((see(asked, keys, head=head) != expected) & real).any()) for head in {0, num_heads - 1})
