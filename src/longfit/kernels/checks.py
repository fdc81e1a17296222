"""What the operations of ``ops.py`` refuse, and how they say it.

Every call is checked, and the shortest take twenty microseconds: sizes that a format determines are computed once, and
what a tensor tells is asked for once.
"""

from functools import cache

import torch
from torch import Tensor

from longfit.numerics.quant_state import QuantState
from longfit.numerics.row_format import RowFormat

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RowSizes:
    """A row format and the sizes that every call is checked against, computed once per format."""

    def __init__(self, fmt: RowFormat) -> None:
        self.fmt, self.rows, self.row_bytes, self.constant_bytes = fmt, fmt.rows, fmt.row_bytes, fmt.constant_bytes


@cache
def row_sizes_of(fmt: RowFormat) -> RowSizes:
    """Return the sizes of a format."""
    return RowSizes(fmt)


def check_float(name: str, values: Tensor) -> None:
    """Raise TypeError unless values are floats that longfit reads."""
    if values.dtype not in FLOATS:
        raise TypeError(f"{name}: got {values.dtype}; allowed: float16, bfloat16, float32, float64; convert it first")


def check_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError unless longfit writes this dtype."""
    if dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype}; allowed: float16, bfloat16, float32, float64")


def check_packed(packed: Tensor, state: QuantState) -> None:
    """Raise ValueError unless these are the codes of the weight that the state describes."""
    if packed.dtype != torch.uint8 or packed.shape != ((state.numel + 1) // 2,):
        raise ValueError(
            f"packed: got {packed.dtype} {list(packed.shape)}; a weight of {list(state.shape)} needs "
            f"uint8 [{(state.numel + 1) // 2}]; view stored bf16 or fp32 as uint8 and flatten it"
        )


def check_codebook(codebook: Tensor) -> None:
    """Raise ValueError unless this is a codebook of 8-bit quantisation."""
    if codebook.dtype != torch.float32 or codebook.dim() != 1 or not 2 <= codebook.numel() <= 256:
        raise ValueError(f"codebook: got {codebook.dtype} {list(codebook.shape)}; allowed: float32 [2] to [256]")


def check_rows(rows: Tensor, constants: Tensor, sizes: RowSizes, first_row: int) -> int:
    """Return the number of rows; raise ValueError unless they and the constants belong to the format."""
    shape = rows.shape
    if rows.dtype != torch.uint8 or len(shape) != 2 or shape[1] != sizes.row_bytes:
        raise ValueError(f"rows: got {rows.dtype} {list(shape)}; {sizes.fmt} needs uint8 [n, {sizes.row_bytes}]")
    if not 0 <= first_row <= sizes.rows - shape[0]:
        raise ValueError(f"first_row: got {first_row} with {shape[0]} rows; the weight is laid out in {sizes.rows}")
    if constants.dtype != torch.uint8 or constants.shape != (sizes.constant_bytes,):
        raise ValueError(
            f"constants: got {constants.dtype} {list(constants.shape)}; {sizes.fmt} needs "
            f"uint8 [{sizes.constant_bytes}]"
        )
    return shape[0]


def check_matmul(name: str, x: Tensor, features: int, rows: Tensor, constants: Tensor, sizes: RowSizes) -> None:
    """Raise ValueError or TypeError unless the last axis of ``x`` meets the whole weight, on one device."""
    check_float(name, x)
    if x.shape[-1:] != (features,):
        raise ValueError(f"{name}: got {list(x.shape)}; the last axis must be {features} for {sizes.fmt}")
    num_rows = check_rows(rows, constants, sizes, 0)
    if num_rows != sizes.rows:
        raise ValueError(f"rows: got {num_rows}; a matmul needs all {sizes.rows} rows of {sizes.fmt}")
    if rows.device != x.device:
        raise ValueError(f"{name}: on {x.device}, the weight is on {rows.device}; move one of them")
