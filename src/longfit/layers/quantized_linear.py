"""What frozen layers in few bits have in common: one parameter of bytes, and a matmul with its gradient.

A layer's weight exists densely only inside a matmul: forward de-quantises, backward de-quantises again, nothing keeps
the copy. There is no gradient for the weight itself; training goes through the adapter of ``qlora.py``.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longfit.compat.torch import autocast_dtype


class Product(Protocol):
    """How a stored weight multiplies; hashable, without tensors of its own."""

    def linear(self, x: Tensor, weight: Tensor, constants: Tensor) -> Tensor:
        """``X W^T``, ``[..., I]`` to ``[..., O]`` in the dtype of ``x``."""

    def grad_input(self, grad: Tensor, weight: Tensor, constants: Tensor) -> Tensor:
        """``dY dq(W)``, ``[..., O]`` to ``[..., I]`` in the dtype of ``grad``."""


class FrozenMatmul(torch.autograd.Function):
    """``Y = X W^T`` and ``dX = dY dq(W)``; saves the stored weight, never the de-quantised one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, constants: Tensor, product: Product) -> Tensor:
        ctx.save_for_backward(weight, constants)
        ctx.product = product
        return product.linear(x, weight, constants)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        weight, constants = ctx.saved_tensors
        return ctx.product.grad_input(grad, weight, constants), None, None, None


class QuantizedLinear(nn.Linear):
    """``nn.Linear`` with a frozen weight in few bits; computes in the dtype of its input.

    Attributes:
        weight: one parameter of bytes ``[rows, row_bytes]`` that can be cut along its rows.
        constants: uint8, what all rows share; may be empty.
        bias: ``[O]`` or None; kept as it is.
        stands_for_conv1d: the layer was transformers' ``Conv1D`` (GPT-2), whose dense weight is ``[I, O]``.
    """

    constants: Tensor
    stands_for_conv1d: bool = False
    bias: nn.Parameter | None  # type: ignore[assignment]  # nn.Linear declares it without None, and yet sets None

    def __init__(
        self, in_features: int, out_features: int, weight: Tensor, constants: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("constants", constants)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def product(self) -> Product:
        """How the weight multiplies."""
        raise NotImplementedError

    @property
    def dense_dtype(self) -> torch.dtype:
        """The dtype of the weight that was quantised, and of what `dequantize` returns unless told otherwise."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight ``[O, I]``; ``dtype`` defaults to `dense_dtype`."""
        raise NotImplementedError

    def stored(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A dense weight in this layer's format: what `weight` and `constants` would hold."""
        raise NotImplementedError

    def dense_layer(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A frozen layer of the kind that was quantised, with these values.

        Args:
            weight: ``[O, I]``.
        """
        from transformers.pytorch_utils import Conv1D

        layer: nn.Module
        if self.stands_for_conv1d:
            layer = Conv1D(self.out_features, self.in_features)
            weight = weight.t().contiguous()
            bias = weight.new_zeros(self.out_features) if bias is None else bias
        else:
            layer = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        return layer

    def sharing(self, weight: Tensor, constants: Tensor) -> QuantizedLinear:
        """A layer of the same format, without a bias, that has these bytes."""
        raise NotImplementedError

    def constants_finite(self) -> bool:
        """Whether no block constant is NaN or infinite."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` in the dtype of ``x`` (or of autocast, where it is on)."""
        y = self.matmul(autocast_input(x))
        return y if self.bias is None else y.add_(self.bias.to(y.dtype))  # y is nobody else's

    def matmul(self, x: Tensor) -> Tensor:
        """``X W^T``, without the bias, in the dtype of ``x``; differentiable with respect to ``x``."""
        y: Tensor = FrozenMatmul.apply(x, self.weight, self.constants, self.product)
        return y


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast asks for; unchanged where autocast is off, as ``F.linear`` would do."""
    dtype = autocast_dtype(x.device)
    return x if dtype is None else x.to(dtype)
