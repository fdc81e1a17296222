"""The oracle as a backend: `numerics` behind the signatures of the kernel table. Any device, no compiler, no speed."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longfit.numerics import adamw, quant_state, row_format
from longfit.numerics.adamw import AdamwUpdate
from longfit.numerics.blockwise import dequantize_blockwise, quantize_blockwise
from longfit.numerics.quant_state import QuantState
from longfit.numerics.row_format import RowFormat


def unavailable() -> str | None:
    """Return why this backend cannot be used: it always can."""
    return None


def why() -> str:
    """Return what is in use, for the report of `longfit.kernels.dispatch.backends`."""
    return "plain torch"


def quantize_4bit(
    weight: Tensor, *, quant_type: str, block_size: int, double_quant: bool, absmax_block_size: int
) -> tuple[Tensor, QuantState]:
    """See `longfit.numerics.quant_state.quantize_4bit`."""
    return quant_state.quantize_4bit(
        weight,
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        absmax_block_size=absmax_block_size,
    )


def dequantize_4bit(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """See `longfit.numerics.quant_state.dequantize_4bit`."""
    return quant_state.dequantize_4bit(packed, state, dtype)


def quantize_8bit(values: Tensor, codebook: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """See `longfit.numerics.blockwise.quantize_blockwise`."""
    return quantize_blockwise(values, codebook, block_size=block_size)


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, *, block_size: int, dtype: torch.dtype) -> Tensor:
    """See `longfit.numerics.blockwise.dequantize_blockwise`."""
    return dequantize_blockwise(codes, absmax, codebook, block_size=block_size, dtype=dtype)


def dequantize_rows(rows: Tensor, constants: Tensor, fmt: RowFormat, dtype: torch.dtype, *, first_row: int) -> Tensor:
    """See `longfit.numerics.row_format.dequantize_rows`."""
    return row_format.dequantize_rows(rows, constants, fmt, dtype, first_row=first_row)


def linear_4bit(x: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat) -> Tensor:
    """Multiply by the de-quantised weight, transposed: ``[..., in] -> [..., out]`` in the dtype of ``x``."""
    return F.linear(x, row_format.dequantize_rows(rows, constants, fmt, x.dtype))


def linear_4bit_grad_input(grad: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat) -> Tensor:
    """Multiply by the de-quantised weight: ``[..., out] -> [..., in]`` in the dtype of ``grad``."""
    return grad @ row_format.dequantize_rows(rows, constants, fmt, grad.dtype)


def adamw_step(updates: Sequence[AdamwUpdate]) -> None:
    """See `longfit.numerics.adamw.adamw_step`."""
    adamw.adamw_step(updates)
