"""A frozen linear layer whose weight is stored in 4 bits (QLoRA, section 3).

The weight is ONE uint8 parameter. Its rows hold a row's packed codes and, behind them, the block constants of that
row, so that the layer can be sharded by rows without ever splitting a block, moved, copied and pickled like any
parameter, and never be cast by ``model.to(dtype)``. The few bytes that all rows share (the constants of the double
quantisation) are a uint8 buffer.

The 16-bit weight exists only inside a matmul (``quantized_linear.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longfit.compat.torch_distributed import local_part
from longfit.kernels.dispatch import dequantize_rows, linear_4bit, linear_4bit_grad_input, quantize_4bit
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.numerics.quant_state import QuantState
from longfit.numerics.row_format import RowFormat, from_rows, to_rows


@dataclass(frozen=True)
class Product4bit:
    """``X dq(W)^T`` and ``dY dq(W)`` of a weight in rows."""

    row_format: RowFormat

    def linear(self, x: Tensor, weight: Tensor, constants: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]``."""
        return linear_4bit(x, weight, constants, self.row_format)

    def grad_input(self, grad: Tensor, weight: Tensor, constants: Tensor) -> Tensor:
        """``[..., O]`` to ``[..., I]``."""
        return linear_4bit_grad_input(grad, weight, constants, self.row_format)


class Linear4bit(QuantizedLinear):
    """``nn.Linear`` with a frozen 4-bit weight; computes in the dtype of its input.

    Args:
        row_format: sizes, data type and block sizes of the stored weight.
        rows: uint8 ``[row_format.rows, row_format.row_bytes]``: per row the packed codes, then the block constants.
        constants: uint8, what all rows share; empty without double quantisation.
        bias: ``[out_features]`` or None; kept as it is.

    Source: QLoRA, section 3, equation 5 without the adapter.
    """

    def __init__(self, row_format: RowFormat, rows: Tensor, constants: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(row_format.in_features, row_format.out_features, rows, constants, bias)
        self.row_format = row_format

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        absmax_block_size: int = 256,
    ) -> Linear4bit:
        """Quantise a dense layer; the dense layer is left as it was."""
        packed, state = quantize_4bit(
            linear.weight.detach(),
            quant_type=quant_type,
            block_size=block_size,
            double_quant=double_quant,
            absmax_block_size=absmax_block_size,
        )
        return cls.from_packed(packed, state, bias=linear.bias)

    @classmethod
    def from_packed(cls, packed: Tensor, state: QuantState, *, bias: Tensor | None = None) -> Linear4bit:
        """Adopt a weight that is already quantised, for example one read from a bitsandbytes file."""
        rows, constants = to_rows(packed, state)
        return cls(RowFormat.of(state), rows, constants, None if bias is None else bias.detach())

    @classmethod
    def placeholder(cls, row_format: RowFormat, *, bias: bool, bias_dtype: torch.dtype, device: Any) -> Linear4bit:
        """A layer of the right shapes with undefined bytes, to be filled by a loader."""
        rows = torch.empty(row_format.rows, row_format.row_bytes, dtype=torch.uint8, device=device)
        constants = torch.empty(row_format.constant_bytes, dtype=torch.uint8, device=device)
        bias_values = torch.empty(row_format.out_features, dtype=bias_dtype, device=device) if bias else None
        return cls(row_format, rows, constants, bias_values)

    def packed(self) -> tuple[Tensor, QuantState]:
        """The weight as ``numerics.quant_state`` and bitsandbytes files know it: flat packed bytes, and their state."""
        return from_rows(self.weight.data, self.constants, self.row_format)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight ``[out_features, in_features]``; ``dtype`` defaults to the dtype that was quantised."""
        return dequantize_rows(self.weight.data, self.constants, self.row_format, dtype or self.row_format.dtype)

    @property
    def product(self) -> Product4bit:
        """How the weight multiplies."""
        return Product4bit(self.row_format)

    @property
    def dense_dtype(self) -> torch.dtype:
        """The dtype that was quantised."""
        return self.row_format.dtype

    def stored(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A dense weight in this layer's format: rows and constants."""
        f = self.row_format
        packed, state = quantize_4bit(
            weight,
            quant_type=f.quant_type,
            block_size=f.block_size,
            double_quant=f.double_quant,
            absmax_block_size=f.absmax_block_size,
        )
        self.row_format = RowFormat.of(state)
        return to_rows(packed, state)

    def sharing(self, weight: Tensor, constants: Tensor) -> Linear4bit:
        """A layer of the same format, without a bias, that has these bytes."""
        return Linear4bit(self.row_format, weight, constants)

    def constants_finite(self) -> bool:
        """Whether no block constant is NaN or infinite; double quantisation spreads one NaN to all of them."""
        f = self.row_format
        rows = local_part(self.weight.detach())
        scales = self.constants if f.double_quant else rows[:, f.code_bytes :].contiguous()
        return bool(scales.view(torch.float32).isfinite().all())

    def extra_repr(self) -> str:
        f = self.row_format
        double = f", double_quant (absmax_block_size={f.absmax_block_size})" if f.double_quant else ""
        return (
            f"in_features={f.in_features}, out_features={f.out_features}, bias={self.bias is not None}, "
            f"{f.quant_type}, block_size={f.block_size}{double}"
        )
