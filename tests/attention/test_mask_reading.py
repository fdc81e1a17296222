"""What is read from a mask function equals the function, pair by pair, or is refused."""

import pytest
import torch
from torch import nn
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

from longfit.attention import mask_reading
from longfit.attention.hf_attention import attend
from longfit.attention.mask_reading import read_mask, unreadable
from longfit.errors import ModelError

TOKENS = 41
PADDING = torch.ones(2, TOKENS, dtype=torch.bool)
PADDING[0, :5], PADDING[1, 36:] = False, False
LEFT = torch.tensor([5, 0])  # padding tokens before each row's text
DOCUMENTS = torch.stack([torch.arange(TOKENS) // 13, torch.arange(TOKENS) // 17])
MASKS = {
    "causal": causal_mask_function,
    "window": sliding_window_causal_mask_function(9),
    "chunks": chunked_causal_mask_function(7, LEFT),
    "documents": and_masks(causal_mask_function, packed_sequence_mask_function(DOCUMENTS)),
    "window in documents": and_masks(sliding_window_causal_mask_function(9), packed_sequence_mask_function(DOCUMENTS)),
}


def dense(function, rows: int, tokens: int) -> torch.Tensor:
    """The mask as a whole, bool [B, T, T]."""
    index = [torch.arange(rows)[:, None, None], torch.zeros(1, 1, 1, dtype=torch.int64)]
    t = torch.arange(tokens)
    return torch.as_tensor(function(*index, t[None, :, None], t[None, None, :])).expand(rows, tokens, tokens)


@pytest.mark.parametrize("checked_pairs", [1 << 16, 1], ids=["all pairs", "samples"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MASKS)
def test_the_range_read_is_the_mask(name: str, padding, checked_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_reading, "CHECKED_PAIRS", checked_pairs)
    read = read_mask(
        MASKS[name], batch_size=2, num_queries=TOKENS, num_keys=TOKENS, padding=padding, own_structure="w" in name
    )
    assert read.shape == (2, 1, TOKENS, 2)
    assert read.dtype == torch.int32
    assert bool((read[..., 1] == ("w" in name)).all())
    keys = torch.arange(TOKENS)
    found = (keys >= read[:, 0, :, :1]) & (keys <= keys[:, None])
    expected = dense(MASKS[name], 2, TOKENS)
    if padding is not None:
        real = padding[:, :, None] & padding[:, None, :]
        assert torch.equal(found & real, expected & real)
        assert not bool((found & padding[:, :, None] & ~padding[:, None, :]).any())  # nothing real sees padding
        assert bool(found.any(-1).all())  # and padding sees something, so that it stays finite
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", MASKS)
def test_queries_at_the_end_of_a_cache_are_counted_from_its_first_key(name: str) -> None:
    offset, queries = 11, 6
    read = read_mask(
        MASKS[name], batch_size=2, num_queries=queries, num_keys=TOKENS - offset, key_offset=offset
    )  # fmt: skip
    keys = torch.arange(TOKENS - offset)
    found = (keys >= read[:, 0, -queries:, :1]) & (keys <= keys[-queries:, None])
    assert torch.equal(found, dense(MASKS[name], 2, TOKENS)[:, -queries:, offset:])


@pytest.mark.parametrize("checked_pairs", [1 << 16, 1], ids=["all pairs", "samples"])
@pytest.mark.parametrize(
    "function",
    [
        or_masks(causal_mask_function, lambda b, h, q, k: (q < 8) & (k < 8)),  # a prefix that sees itself both ways
        and_masks(causal_mask_function, lambda b, h, q, k: (q - k) % 3 == 0),  # dilated
        or_masks(sliding_window_causal_mask_function(5), lambda b, h, q, k: (k < 2) & (k <= q)),  # sinks and a window
        and_masks(causal_mask_function, lambda b, h, q, k: (h == 0) | (k > q - 4)),  # another window in the last head
    ],
    ids=["prefix", "dilated", "first tokens and a window", "heads that differ"],
)
def test_a_mask_of_another_kind_is_refused(function, checked_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_reading, "CHECKED_PAIRS", checked_pairs)
    read = read_mask(function, batch_size=1, num_queries=TOKENS, num_keys=TOKENS, num_heads=3)
    assert unreadable(read)
    q = torch.zeros(1, 3, TOKENS, 8)
    with pytest.raises(ModelError, match="none that longfit's attention computes"):  # the layer that would use it
        attend(nn.Module(), q, q, q, read)
