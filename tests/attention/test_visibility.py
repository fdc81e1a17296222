"""Schedules against the dense masks they stand for, and every hint of where documents begin."""

import pytest
import torch

from longfit.attention.visibility import build_schedule, document_starts
from longfit.errors import ContextError, DataError
from longfit.numerics import shifted_attention


def visible(schedule) -> torch.Tensor:
    """[B, H, T, T] bool, the mask that a schedule stands for."""
    per_class = schedule.first_key.transpose(0, 1)  # [B, C, T]
    heads = torch.tensor(schedule.head_bounds).diff()
    first = per_class.repeat_interleave(heads, dim=1)[..., None]
    keys = torch.arange(schedule.num_tokens)
    return (keys >= first) & (keys <= keys[:, None])


@pytest.mark.parametrize("num_heads", [1, 2, 8, 9])
@pytest.mark.parametrize("num_tokens", [1, 63, 65, 130])
def test_schedules_are_the_masks_of_numerics(num_heads: int, num_tokens: int) -> None:
    positions = torch.stack([torch.arange(num_tokens) % 50, torch.arange(num_tokens)])
    starts = document_starts(2, num_tokens, position_ids=positions)
    for group_size in (None, 2, 16, 500):
        schedule = build_schedule(num_heads, starts, group_size=group_size)
        expected = shifted_attention.mask(num_heads, starts, group_size=group_size)
        assert torch.equal(visible(schedule), expected)
        assert (schedule.first_key.diff() >= 0).all()
        assert schedule.first_key.dtype == torch.int32
        assert all(low < high for low, high in zip(schedule.head_bounds, schedule.head_bounds[1:], strict=False))
    for window in (1, 9, 500):
        schedule = build_schedule(num_heads, starts, group_size=16, sliding_window=window)  # the window wins
        keys = torch.arange(num_tokens)
        near = keys > keys[:, None] - window
        assert torch.equal(visible(schedule), shifted_attention.mask(num_heads, starts) & near)


def test_a_tile_is_a_view_with_global_keys() -> None:
    schedule = build_schedule(4, document_starts(1, 40), group_size=8)
    tile = schedule.tile(20, 10)
    assert torch.equal(tile, schedule.first_key[:, :, 20:30])
    assert tile.untyped_storage().data_ptr() == schedule.first_key.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("hints", "expected"),
    [
        ({}, [0, 0, 0, 0, 0, 0]),
        ({"position_ids": [[0, 1, 2, 0, 1, 0]]}, [0, 0, 0, 3, 3, 5]),
        (
            {"position_ids": [[5, 6, 9, 10, 3, 4]]},
            [0, 0, 2, 2, 4, 4],
        ),  # a jump forward begins one too, as in transformers
        ({"attention_mask": [[0, 0, 1, 1, 1, 1]]}, [0, 0, 2, 2, 2, 2]),
        ({"attention_mask": [[1, 1, 1, 1, 0, 0]]}, [0, 0, 0, 0, 4, 4]),
        ({"attention_mask": [[0, 1, 1, 1, 1, 0]]}, [0, 1, 1, 1, 1, 5]),
        ({"attention_mask": [[0, 0, 0, 0, 0, 0]]}, [0, 0, 0, 0, 0, 0]),
        ({"attention_mask": [[1, 1, 2, 2, 2, 0]]}, [0, 0, 2, 2, 2, 5]),  # document numbers, 0 is padding
        ({"cu_seqlens": [0, 2, 2, 6]}, [0, 0, 2, 2, 2, 2]),
        ({"position_ids": [[0, 1, 2, 0, 1, 2]], "attention_mask": [[1, 1, 1, 1, 1, 0]]}, [0, 0, 0, 3, 3, 5]),
    ],
)
def test_document_starts(hints, expected) -> None:
    starts = document_starts(1, 6, **{name: torch.tensor(value) for name, value in hints.items()})
    assert starts.tolist() == [expected]
    assert starts.dtype == torch.int32


def test_one_row_of_positions_serves_the_batch() -> None:
    starts = document_starts(2, 4, position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert starts.tolist() == [[0, 0, 2, 2]] * 2


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"attention_mask": [[1, 0, 1, 1], [1, 1, 1, 1]]}, "row 0 has 2 runs of real tokens"),
        ({"attention_mask": [[1, 1, 1, 1], [0, 1, 0, 1]]}, "row 1 has 2 runs"),
        ({"attention_mask": [[1, 1, 1], [1, 1, 1]]}, r"attention_mask: got shape \[2, 3\], allowed is \[2, 4\]"),
        ({"position_ids": [0, 1, 2, 3]}, "position_ids: got shape"),
        ({"cu_seqlens": [0, 4]}, "over a single row"),
    ],
)
def test_wrong_hints(hints, message: str) -> None:
    with pytest.raises(DataError, match=message):
        document_starts(2, 4, **{name: torch.tensor(value) for name, value in hints.items()})


@pytest.mark.parametrize("bounds", [[0, 3], [1, 4], [0, 3, 2, 4], []])
def test_wrong_cu_seqlens(bounds) -> None:
    with pytest.raises(DataError, match="must rise from 0 to 4"):
        document_starts(1, 4, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_group_and_window_errors() -> None:
    starts = document_starts(1, 4)
    with pytest.raises(ContextError, match="group_size 7: must be an even number"):
        build_schedule(4, starts, group_size=7)
    with pytest.raises(ContextError, match="try group_size 2"):
        build_schedule(4, starts, group_size=0)
    with pytest.raises(ContextError, match="at least 1 token"):
        build_schedule(4, starts, sliding_window=0)
