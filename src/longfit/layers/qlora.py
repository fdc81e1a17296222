"""The QLoRA layer: ``Y = X dq(W) + scaling (X A) B`` as one autograd function (QLoRA, section 3, equation 5).

It is a PEFT LoRA layer for ``Linear4bit``: PEFT creates, saves and loads it, adapter files stay plain PEFT files.
What it adds is economy. PEFT clones the base output, casts the input to fp32 for the adapter and back, and keeps
both; here the adapter runs in the compute dtype, its result is added in place, and the backward keeps only X and X A.
The adapter's own weights and their gradients stay fp32.

It is not a merge tool: adding an adapter into 4-bit codes rounds it away, so ``merge`` refuses and
``merge_and_unload`` gives dense layers.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from longfit.errors import ModelError
from longfit.kernels.dispatch import linear_4bit, linear_4bit_grad_input
from longfit.layers.linear4bit import Linear4bit, autocast_input
from longfit.numerics.row_format import RowFormat


class QLoRAMatmul(torch.autograd.Function):
    """One frozen 4-bit matmul and one low-rank adapter.

    ``adapter_x`` is ``x`` itself or, under LoRA dropout, the dropped-out ``x``. ``A`` is ``[R, I]``, ``B`` is ``[O,
    R]``, both fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        adapter_x: Tensor,
        A: Tensor,
        B: Tensor,
        rows: Tensor,
        constants: Tensor,
        row_format: RowFormat,
        scaling: float,
    ) -> Tensor:
        flat = adapter_x.reshape(-1, adapter_x.shape[-1])  # [N, I]
        hidden = flat @ A.t().to(flat.dtype)  # [N, R]
        y = linear_4bit(x, rows, constants, row_format)  # [..., O]
        y.view(-1, y.shape[-1]).addmm_(hidden, B.t().to(y.dtype), alpha=scaling)
        ctx.save_for_backward(flat, hidden, A, B, rows, constants)
        ctx.row_format, ctx.scaling, ctx.shared_input = row_format, scaling, adapter_x is x
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, hidden, A, B, rows, constants = ctx.saved_tensors
        x_wanted, adapter_x_wanted, A_wanted, B_wanted = ctx.needs_input_grad[:4]
        flat_grad = grad.reshape(-1, grad.shape[-1])  # [N, O]
        hidden_grad = (flat_grad @ B.to(grad.dtype)).mul_(ctx.scaling)  # [N, R]
        A_grad = (hidden_grad.t() @ flat).to(A.dtype) if A_wanted else None  # [R, I]
        B_grad = (hidden.t() @ flat_grad).t().to(B.dtype).mul_(ctx.scaling) if B_wanted else None  # [O, R]
        x_grad = adapter_x_grad = None
        if x_wanted:
            x_grad = linear_4bit_grad_input(grad, rows, constants, ctx.row_format)  # [..., I]
            if ctx.shared_input:
                x_grad.view(-1, x_grad.shape[-1]).addmm_(hidden_grad, A.to(grad.dtype))
        if adapter_x_wanted and not ctx.shared_input:
            adapter_x_grad = (hidden_grad @ A.to(grad.dtype)).view(*grad.shape[:-1], -1)
        return x_grad, adapter_x_grad, A_grad, B_grad, None, None, None, None


class QLoRALinear(LoraLinear):
    """PEFT's LoRA layer on a ``Linear4bit`` base.

    One plain adapter takes the fused path. Whatever else PEFT offers (several active adapters, DoRA, mixed batches)
    takes PEFT's own path, which is slower and equally right, since the base layer is an ordinary differentiable
    module.

    Source: QLoRA, section 3, equation 5; LoRA initialisation (A random, B zero) by PEFT.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., I]`` to ``[..., O]`` in the dtype of ``x`` (or of autocast, where it is on)."""
        name = self._single_plain_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base: Linear4bit = self.get_base_layer()
        x = autocast_input(x)
        dropout = self.lora_dropout[name]
        adapter_x = x if isinstance(dropout, nn.Identity) or not dropout.training else dropout(x)
        y = QLoRAMatmul.apply(
            x,
            adapter_x,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            base.weight,
            base.constants,
            base.row_format,
            self.scaling[name],
        )
        return y if base.bias is None else y.add_(base.bias.to(y.dtype))  # y is nobody else's

    def _single_plain_adapter(self) -> str | None:
        """The name of the one active adapter, if it is plain LoRA without a bias of its own."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        name = active[0]
        return None if name in self.lora_variant or self.lora_bias[name] else name

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``scaling B A``, ``[O, I]`` in fp32."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return (B.float() @ A.float()) * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: 4-bit codes are too coarse to hold an adapter."""
        raise ModelError(
            "merge into 4-bit weights: the adapter would be rounded away; "
            "call merge_and_unload(), which returns dense 16-bit layers"
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Linear:
        """The layer without its adapter: the 4-bit base as it is, or a dense layer that holds ``dq(W) + scaling B A``.

        Raises:
            ModelError: ``safe_merge`` and the merged weight is not finite.
        """
        base: Linear4bit = self.get_base_layer()
        if not merge:
            return base
        weight = base.dequantize(torch.float32)
        for name in adapter_names or self.active_adapters:
            if name in self.lora_A:
                weight += self.get_delta_weight(name)
        if safe_merge and not torch.isfinite(weight).all():
            raise ModelError(
                f"merge: adapter {name!r} holds values that are not finite; train again or skip safe_merge"
            )
        dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.to(base.row_format.dtype), requires_grad=False)
        if base.bias is not None:
            dense.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
        return dense
