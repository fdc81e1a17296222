"""The QLoRA layer: ``Y = X dq(W) + scaling (X A) B`` as one autograd function (QLoRA, section 3, equation 5).

It is a PEFT LoRA layer for ``Linear4bit`` and ``Linear8bit``: PEFT creates, saves and loads it, adapter files stay
plain PEFT files. What it adds is economy. PEFT clones the base output, casts the input to fp32 for the adapter and
back, and keeps both; here the adapter runs in the compute dtype, its result is added in place, and the backward keeps
only X and X A. The adapter's own weights and their gradients stay fp32.

Whatever in PEFT reads the weight (starts, DoRA, merging) is shown a dense twin that holds dq(W); what it rewrites there
is never packed again. A start that takes a low-rank part out of the base (PiSSA, OLoRA) leaves the packed base as it
is: the part is kept beside it and subtracted, so that nothing is rounded twice and ``unload`` gives the base back.

It is not a merge tool: adding an adapter into codes of few bits rounds it away, so ``merge`` refuses and
``merge_and_unload`` gives dense layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from longfit.compat.torch import put_parameter
from longfit.errors import ModelError
from longfit.layers.peft_variants import LOW_RANK_STARTS, reads_weight, require_supported, start_of
from longfit.layers.qdora import QDoRAVariant
from longfit.layers.quantized_linear import Product, QuantizedLinear, autocast_input


class QLoRAMatmul(torch.autograd.Function):
    """One frozen matmul and one low-rank adapter.

    ``adapter_x`` is ``x`` itself or, under LoRA dropout, the dropped-out ``x``. ``A`` is ``[R, I]``, ``B`` is ``[O,
    R]``, both fp32. ``known`` is the result where the caller has it, or something that will do for it: then nothing is
    multiplied but what backward needs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        adapter_x: Tensor,
        A: Tensor,
        B: Tensor,
        weight: Tensor,
        constants: Tensor,
        product: Product,
        scaling: float,
        known: Tensor | None = None,
    ) -> Tensor:
        flat = adapter_x.reshape(-1, adapter_x.shape[-1])  # [N, I]
        hidden = flat @ A.t().to(flat.dtype)  # [N, R]
        if known is None:
            y = product.linear(x, weight, constants)  # [..., O]
            y.view(-1, y.shape[-1]).addmm_(hidden, B.t().to(y.dtype), alpha=scaling)
        else:
            y = known
        ctx.save_for_backward(flat, hidden, A, B, weight, constants)
        ctx.product, ctx.scaling, ctx.shared_input = product, scaling, adapter_x is x
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, hidden, A, B, weight, constants = ctx.saved_tensors
        x_wanted, adapter_x_wanted, A_wanted, B_wanted = ctx.needs_input_grad[:4]
        flat_grad = grad.reshape(-1, grad.shape[-1])  # [N, O]
        hidden_grad = (flat_grad @ B.to(grad.dtype)).mul_(ctx.scaling)  # [N, R]
        A_grad = (hidden_grad.t() @ flat).to(A.dtype) if A_wanted else None  # [R, I]
        B_grad = (hidden.t() @ flat_grad).t().to(B.dtype).mul_(ctx.scaling) if B_wanted else None  # [O, R]
        x_grad = adapter_x_grad = None
        if x_wanted:
            x_grad = ctx.product.grad_input(grad, weight, constants)  # [..., I]
            if ctx.shared_input:
                x_grad.view(-1, x_grad.shape[-1]).addmm_(hidden_grad, A.to(grad.dtype))
        if adapter_x_wanted and not ctx.shared_input:
            adapter_x_grad = (hidden_grad @ A.to(grad.dtype)).view(*grad.shape[:-1], -1)
        return x_grad, adapter_x_grad, A_grad, B_grad, *(None,) * 5


class FrozenLowRank(nn.Module):
    """A frozen low-rank matrix ``B A``; moves with its layer, and is in no file, since a start is computed anew."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A, persistent=False)  # [R, I]
        self.register_buffer("B", B, persistent=False)  # [O, R], scaling included

    def forward(self, x: Tensor) -> Tensor:
        """``(X A) B``, ``[..., I]`` to ``[..., O]``."""
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    def dense(self) -> Tensor:
        """``B A``, ``[O, I]`` in fp32."""
        return self.B.float() @ self.A.float()


class TakenOut(LoraVariant):
    """Plain LoRA whose start was taken out of the base: what it took is subtracted again, outside of the dropout."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to do: `QLoRALinear.update_layer` has kept the low-rank part."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """``result + scaling (X A) B - (X A_0) B_0``."""
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        update = B(A(module.lora_dropout[active_adapter](x))) * module.scaling[active_adapter]
        difference: Tensor = result + update - module.starts[active_adapter](x)
        return difference

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the difference to the dense twin."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The dense twin without the difference."""
        without: Tensor = orig_weight - module.get_delta_weight(active_adapter)
        return without


class QLoRALinear(LoraLinear):
    """PEFT's LoRA layer on a quantised base; equal to PEFT's own on a dense base that holds dq(W).

    One plain adapter takes the fused path. Whatever else PEFT offers (several active adapters, DoRA, mixed batches)
    takes PEFT's own path, which is slower and equally right, since the base layer is an ordinary differentiable
    module. Adapters are fp32.

    Raises: ModelError: a way to set up the layer that no quantised base carries (``peft_variants.py``).
    Source: QLoRA, section 3, equation 5; LoRA initialisation (A random, B zero) by PEFT.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config = _as_out_in(config, base_layer)
        require_supported(config)
        if kwargs.get("parameter_name"):
            raise ModelError(
                f"target_parameters {kwargs['parameter_name']!r} of a quantised layer: packed codes are not a matrix "
                "to adapt; name the layer in target_modules"
            )
        self.__dict__["_dense_twin"] = None  # not a submodule: it lives for one call
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """PEFT's variants, DoRA by way of the packed weight."""
        return super().lora_variants | {("use_dora",): QDoRAVariant}

    def get_base_layer(self) -> nn.Module:
        """The quantised layer; while PEFT builds or merges, its dense twin."""
        return self._dense_twin or super().get_base_layer()

    def packed_base(self) -> QuantizedLinear:
        """The quantised layer, always."""
        base: QuantizedLinear = super().get_base_layer()  # PEFT builds us on nothing else
        return base

    @contextmanager
    def dense_twin(self) -> Iterator[nn.Linear]:
        """Show PEFT a dense layer in place of the base: ``dq(W)`` in fp32 and the bias, both copies."""
        base = self.packed_base()
        twin = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        dense = {"weight": base.dequantize(torch.float32)}
        if base.bias is not None:
            dense["bias"] = base.bias.detach().float().clone()
        for name, tensor in dense.items():
            put_parameter(twin, name, nn.Parameter(tensor, requires_grad=False))
        self.__dict__["_dense_twin"] = twin
        try:
            yield twin
        finally:
            self.__dict__["_dense_twin"] = None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter, as PEFT would on a dense base that holds dq(W)."""
        config = _as_out_in(config, self.packed_base())
        require_supported(config)
        if "starts" not in dict(self.named_children()):
            self.starts = nn.ModuleDict()  # adapter name to the low-rank part that it took out of the base
        if not reads_weight(config):
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
            return
        with self.dense_twin():
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        if start_of(config) in LOW_RANK_STARTS:
            A, B = self.lora_A[adapter_name].weight.detach(), self.lora_B[adapter_name].weight.detach()
            self.starts[adapter_name] = FrozenLowRank(A.clone(), B * self.scaling[adapter_name])
            self.lora_variant[adapter_name] = TakenOut()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; a low-rank part that it took out of the base is in the base again."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.starts:
            del self.starts[adapter_name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., I]`` to ``[..., O]`` in the dtype of ``x`` (or of autocast, where it is on)."""
        name = self._single_plain_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        y, bias = self._multiply(name, x), self.packed_base().bias
        return y if bias is None else y.add_(bias.to(y.dtype))  # y is nobody else's

    def forward_known(self, x: Tensor, known: Tensor | None) -> Tensor | None:
        """Record `forward` for backward without its products.

        Args:
            x: ``[..., I]``.
            known: what `forward` has given for it, which becomes the result; None for zeros that nobody will read.
        Returns: ``[..., O]``, or None where only `forward` will do.
        """
        name = self._single_plain_adapter()
        if name is None:
            return None
        if known is None:
            known = autocast_input(x).new_zeros(*x.shape[:-1], self.out_features)
        return self._multiply(name, x, known=known)

    def _multiply(self, name: str, x: Tensor, *, known: Tensor | None = None) -> Tensor:
        """The product with the base and one adapter, without the bias."""
        base = self.packed_base()
        x = autocast_input(x)
        dropout = self.lora_dropout[name]
        adapter_x = x if isinstance(dropout, nn.Identity) or not dropout.training else dropout(x)
        y: Tensor = QLoRAMatmul.apply(
            x,
            adapter_x,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            base.weight,
            base.constants,
            base.product,
            self.scaling[name],
            known,
        )
        return y

    def _single_plain_adapter(self) -> str | None:
        """The name of the one active adapter, if it is plain LoRA without a bias or a start taken out of the base."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        name = active[0]
        plain = name not in self.lora_variant and not self.lora_bias[name]
        return name if plain else None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to dq(W), ``[O, I]`` in fp32: ``scaling B A``, less what its start took out."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        delta = (B.float() @ A.float()) * self.scaling[adapter]
        return delta - self.starts[adapter].dense() if adapter in self.starts else delta  # type: ignore[operator]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: codes of few bits are too coarse to hold an adapter. (PEFT's merge into the dense twin passes.)

        Raises: ModelError: always, but for the twin.
        """
        if self._dense_twin is None:
            raise ModelError(
                "merge into quantised weights: the adapter would be rounded away; "
                "call merge_and_unload(), which returns dense 16-bit layers"
            )
        super().merge(safe_merge, adapter_names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The layer without its adapter: the quantised base as it is, or a dense layer that holds base and adapter.

        Raises:
            ModelError: ``safe_merge`` and the merged weight is not finite, or an adapter has a bias and the base none.
        """
        base = self.packed_base()
        if not merge:
            return base
        names = [name for name in adapter_names or self.active_adapters if name in self.lora_A]
        biased = [name for name in names if self.lora_bias[name]]
        if biased and base.bias is None:
            raise ModelError(
                f"merge: adapter {biased[0]!r} has a bias (lora_bias) and the base layer has none to add it to; "
                "keep the adapter, or train it without lora_bias"
            )
        with self.dense_twin() as twin:
            self.merge(adapter_names=names)
            self.merged_adapters.clear()  # the base itself holds none
        merged = [twin.weight] if base.bias is None else [twin.weight, twin.bias]
        if safe_merge and not all(bool(torch.isfinite(tensor).all()) for tensor in merged):
            raise ModelError(
                f"merge: adapters {', '.join(names)} hold values that are not finite; train again or skip safe_merge"
            )
        bias = None if base.bias is None else twin.bias.data.to(base.bias.dtype)
        return base.dense_layer(twin.weight.data.to(base.dense_dtype), bias)


def _as_out_in(config: LoraConfig, base: nn.Module) -> LoraConfig:
    """A configuration for a weight ``[O, I]``; PEFT asks for ``fan_in_fan_out`` where it sees a ``Conv1D``."""
    if not config.fan_in_fan_out or not getattr(base, "stands_for_conv1d", False):
        return config
    config = copy.copy(config)
    config.fan_in_fan_out = False
    return config
