"""A frozen linear layer whose weight is stored in 8 bits, one constant a row (Dettmers et al., 2022: LLM.int8()).

The weight is ONE int8 parameter. A row holds its codes and, behind them, the four bytes of its fp32 constant, so that
the layer can be sharded by rows, moved, copied and pickled like any parameter, and is never cast.

It multiplies in one of two ways. With a ``threshold`` activations are quantised token by token and multiplied in
integers, outliers in 16 bits: LLM.int8(). Without one the weight is de-quantised, which rounds no activation. Backward
de-quantises in both: gradients are too small for 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfit.compat.torch_distributed import local_part
from longfit.kernels.int8_matmul import linear_8bit
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.numerics.vectorwise import dequantize_vectors, quantize_vectors

CONSTANT_BYTES = 4
"""Of a row: its absmax, fp32."""


def join_rows(codes: Tensor, absmax: Tensor) -> Tensor:
    """Put each row's constant behind its codes: int8 ``[O, I]`` and fp32 ``[O]`` to int8 ``[O, I + 4]``."""
    return torch.cat([codes, absmax.contiguous().view(torch.int8).view(-1, CONSTANT_BYTES)], dim=1)


def split_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `join_rows`: codes are a view, the absmax a copy, which is aligned."""
    absmax = rows[:, -CONSTANT_BYTES:].clone(memory_format=torch.contiguous_format)
    return rows[:, :-CONSTANT_BYTES], absmax.view(torch.float32).view(-1)


@dataclass(frozen=True)
class Product8bit:
    """``X W^T``, in integers or by dq(W), and ``dY dq(W)``."""

    threshold: float | None

    def linear(self, x: Tensor, weight: Tensor, constants: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]``."""
        codes, absmax = split_rows(weight)
        if self.threshold is not None:
            return linear_8bit(x, codes, absmax, threshold=self.threshold)
        return F.linear(x, dequantize_vectors(codes, absmax, dtype=x.dtype))

    def grad_input(self, grad: Tensor, weight: Tensor, constants: Tensor) -> Tensor:
        """``[..., O]`` to ``[..., I]``."""
        codes, absmax = split_rows(weight)
        return grad @ dequantize_vectors(codes, absmax, dtype=grad.dtype)


class Linear8bit(QuantizedLinear):
    """``nn.Linear`` with a frozen 8-bit weight; computes in the dtype of its input.

    Args:
        rows: int8 ``[out_features, in_features + 4]``: codes, then the row's absmax.
        dtype: of the weight that was quantised.
        bias: ``[out_features]`` or None; kept as it is.
        threshold: magnitude from which an activation is multiplied in 16 bits, the others in 8 (0: all of them);
            None multiplies by the de-quantised weight.

    Source: Dettmers et al., "LLM.int8()", 2022, sections 2 and 3.
    """

    def __init__(
        self, rows: Tensor, *, dtype: torch.dtype, bias: Tensor | None = None, threshold: float | None = None
    ) -> None:
        if rows.dtype != torch.int8 or rows.dim() != 2 or rows.shape[1] <= CONSTANT_BYTES:
            raise ValueError(f"rows: got {rows.dtype} {list(rows.shape)}; needs int8 [out, in + {CONSTANT_BYTES}]")
        constants = torch.empty(0, dtype=torch.uint8, device=rows.device)
        super().__init__(rows.shape[1] - CONSTANT_BYTES, rows.shape[0], rows, constants, bias)
        self.dtype, self.threshold = dtype, threshold

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, threshold: float | None = None) -> Linear8bit:
        """Quantise a dense layer; the dense layer is left as it was."""
        weight = linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(join_rows(*quantize_vectors(weight)), dtype=weight.dtype, bias=bias, threshold=threshold)

    @classmethod
    def placeholder(
        cls,
        out_features: int,
        in_features: int,
        *,
        dtype: torch.dtype,
        bias: bool,
        device: Any,
        threshold: float | None = None,
    ) -> Linear8bit:
        """A layer of the right shapes with undefined bytes, to be filled by a loader."""
        rows = torch.empty(out_features, in_features + CONSTANT_BYTES, dtype=torch.int8, device=device)
        bias_values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        return cls(rows, dtype=dtype, bias=bias_values, threshold=threshold)

    @property
    def product(self) -> Product8bit:
        """How the weight multiplies."""
        return Product8bit(self.threshold)

    @property
    def dense_dtype(self) -> torch.dtype:
        """The dtype that was quantised."""
        return self.dtype

    def codes_and_absmax(self) -> tuple[Tensor, Tensor]:
        """The weight as bitsandbytes files know it: int8 ``[O, I]`` and fp32 ``[O]``."""
        return split_rows(self.weight.data)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight ``[O, I]``; ``dtype`` defaults to the dtype that was quantised."""
        return dequantize_vectors(*self.codes_and_absmax(), dtype=dtype or self.dtype)

    def stored(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A dense weight in this layer's format: rows, and no constants."""
        return join_rows(*quantize_vectors(weight)), torch.empty(0, dtype=torch.uint8, device=weight.device)

    def sharing(self, weight: Tensor, constants: Tensor) -> Linear8bit:
        """A layer of the same format, without a bias, that has these bytes."""
        return Linear8bit(weight, dtype=self.dtype, threshold=self.threshold)

    def constants_finite(self) -> bool:
        """Whether no row's constant is NaN or infinite."""
        return bool(split_rows(local_part(self.weight.detach()))[1].isfinite().all())

    def extra_repr(self) -> str:
        products = "dq(W)" if self.threshold is None else f"LLM.int8(), threshold={self.threshold:g}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"int8, {products}"
        )
