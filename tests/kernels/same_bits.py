"""What it means that two results are the same."""

import torch
from torch import Tensor


def assert_same(mine: Tensor, theirs: Tensor) -> None:
    """Same dtype, shape and values, and NaN where NaN stands; a NaN's payload is nobody's contract."""
    assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
    assert torch.equal(mine.nan_to_num(7.25).cpu(), theirs.nan_to_num(7.25).cpu())
    assert torch.equal(mine.isnan().cpu(), theirs.isnan().cpu())
