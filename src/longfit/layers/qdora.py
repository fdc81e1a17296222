"""DoRA on a quantised base: magnitude and direction of ``dq(W) + scaling B A``, without ever forming that matrix.

    Y = m / ||dq(W) + s B A||  *  X (dq(W) + s B A)^T            norms over the rows of W, one per output
    ||w_o + s b_o A||^2 = ||w_o||^2 + 2 s b_o (A w_o) + s^2 b_o (A A^T) b_o^T

PEFT de-quantises the whole weight and multiplies A and B by the identity in each forward pass. Here ``A dq(W)^T`` is
one matmul with R rows, and the norms of the frozen rows are computed once. As in PEFT, the norm gets no gradient.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5 and section 4.3.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn


class QDoRALayer(DoraLinearLayer):
    """PEFT's magnitude vector, saved under PEFT's name; reads the base through its matmul."""

    base_squares: Tensor | None

    def __init__(self, fan_in_fan_out: bool) -> None:
        super().__init__(fan_in_fan_out)
        self.register_buffer("base_squares", None, persistent=False)  # [O], ||w_o||^2 of the frozen weight

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What is added to the base's output, ``[..., O]``; PEFT's signature.

        ``base_result`` is that output with its bias, or None under dropout, where the base sees the dropped-out ``x``.
        """
        bias = base_layer.bias
        if base_result is None:
            base_result = base_layer.matmul(x)
        elif bias is not None:
            base_result = base_result - bias
        norm = self.row_norms(base_layer, lora_A.weight, lora_B.weight, scaling)
        ratio = (self.weight / norm).view(1, -1)  # [1, O]
        return (ratio - 1) * base_result + ratio * lora_B(lora_A(x)) * scaling

    @torch.no_grad()
    def row_norms(self, base_layer: Any, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """``||dq(W) + scaling B A||`` over each row, ``[O]``, in fp32."""
        if self.base_squares is None:
            self.base_squares = base_layer.dequantize(torch.float32).square().sum(dim=1)
        A, B = A.float(), B.float()
        cross = (B * base_layer.matmul(A).t()).sum(dim=1)  # [O]
        own = (B @ (A @ A.t()) * B).sum(dim=1)  # [O]
        squares = self.base_squares + 2 * scaling * cross + scaling**2 * own
        return squares.clamp_(min=0).sqrt_()  # rounding may put the square of a vanishing row below zero


class QDoRAVariant(DoraLinearVariant):
    """PEFT's DoRA with `QDoRALayer` in place of its layer; merging is PEFT's, into a dense twin."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        DoraLinearVariant.init(module, adapter_name, **kwargs)  # the start of the magnitude, from the dense twin
        layer = QDoRALayer(module.fan_in_fan_out)
        layer.weight = module.lora_magnitude_vector[adapter_name].weight
        module.lora_magnitude_vector[adapter_name] = layer
