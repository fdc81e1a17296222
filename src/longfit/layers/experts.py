"""Stacked experts in few bits: every expert is a quantised weight of its own, and only those that are asked are read.

transformers keeps the experts of a layer in parameters ``[E, out, in]`` (or ``[E, in, out]``). Here such a parameter is
bytes ``[E, rows, row_bytes]``: expert by expert what `Linear4bit` or `Linear8bit` would store, so that it costs the
same bits a parameter and can be cut along its experts. What belongs to the bytes (their format, the constants that the
rows of an expert share) is a module beside them, `PackedExperts`; the family's own module stays what it is.

Products are grouped: the tokens of all experts lie one expert behind the other, and each expert that has any multiplies
all of its tokens at once. A low-rank adapter of each expert runs in the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longfit.layers.quantized_linear import Product, QuantizedLinear, autocast_input


class ExpertTokens(NamedTuple):
    """Tokens ``start .. stop - 1``, all of one expert."""

    expert: int
    start: int
    stop: int


@dataclass(frozen=True)
class ExpertAdapter:
    """A low-rank adapter of every expert, as PEFT stores it.

    Attributes:
        A: ``[E R, in]``.
        B: ``[out, R E]``, the expert innermost.
        scaling: of their product.
    """

    A: Tensor
    B: Tensor
    scaling: float


class ExpertsMatmul(torch.autograd.Function):
    """``Y = X dq(W_e)^T + scaling (X A_e^T) B_e^T`` for the tokens of each expert; saves no dense weight.

    ``X`` is ``[S, in]``, ``A`` ``[E R, in]``, ``B`` ``[out, R E]``; both are None without an adapter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        weight: Tensor,
        constants: Tensor,
        spans: tuple[ExpertTokens, ...],
        weights: ExpertProduct,
        scaling: float,
    ) -> Tensor:
        y = x.new_zeros(len(x), weights.out_features)  # [S, O]; rows of no expert stay zero
        hidden = None
        if A is not None and B is not None:
            a, b = _per_expert(A, B, len(weight), x.dtype)
            hidden = x.new_zeros(len(x), a.shape[1])  # [S, R]
        for expert, start, stop in spans:
            tokens = slice(start, stop)
            y[tokens] = weights.forward(x[tokens], weight[expert], constants[expert])
            if hidden is not None:
                torch.mm(x[tokens], a[expert].t(), out=hidden[tokens])
                y[tokens].addmm_(hidden[tokens], b[expert], alpha=scaling)
        ctx.save_for_backward(x, hidden, A, B, weight, constants)
        ctx.spans, ctx.weights, ctx.scaling = spans, weights, scaling
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, A, B, weight, constants = ctx.saved_tensors
        wants_x = ctx.needs_input_grad[0]
        x_grad = torch.zeros_like(x) if wants_x else None
        a = b = A_grad = B_grad = None
        if A is not None:
            a, b = _per_expert(A, B, len(weight), grad.dtype)
            A_grad = torch.zeros(a.shape, dtype=A.dtype, device=A.device)  # [E, R, I]
            B_grad = torch.zeros(b.shape, dtype=B.dtype, device=B.device)  # [E, R, O]
        for expert, start, stop in ctx.spans:
            tokens = slice(start, stop)
            g = grad[tokens]
            if x_grad is not None:
                x_grad[tokens] = ctx.weights.backward(g, weight[expert], constants[expert])
            if a is None or b is None or A_grad is None or B_grad is None:
                continue
            hidden_grad = (g @ b[expert].t()).mul_(ctx.scaling)  # [n, R]
            A_grad[expert] = hidden_grad.t() @ x[tokens]
            B_grad[expert] = (hidden[tokens].t() @ g).mul_(ctx.scaling)
            if x_grad is not None:
                x_grad[tokens].addmm_(hidden_grad, a[expert])
        if A_grad is None or B_grad is None:
            return x_grad, None, None, None, None, None, None, None
        return x_grad, A_grad.view_as(A), B_grad.permute(2, 1, 0).reshape(B.shape), None, None, None, None, None


def _per_expert(A: Tensor, B: Tensor, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """PEFT's ``[E R, I]`` and ``[O, R E]`` as ``[E, R, I]`` and ``[E, R, O]``, to compute with."""
    a = A.view(num_experts, -1, A.shape[1])
    b = B.view(B.shape[0], -1, num_experts).permute(2, 1, 0)
    return a.to(dtype), b.to(dtype, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class ExpertProduct:
    """How the stored weight of an expert multiplies tokens, whichever way round it is stored."""

    product: Product
    out_features: int
    transposed: bool

    def forward(self, x: Tensor, weight: Tensor, constants: Tensor) -> Tensor:
        """``[n, in]`` to ``[n, out]``."""
        multiply = self.product.grad_input if self.transposed else self.product.linear
        return multiply(x, weight, constants)

    def backward(self, grad: Tensor, weight: Tensor, constants: Tensor) -> Tensor:
        """``[n, out]`` to ``[n, in]``."""
        multiply = self.product.linear if self.transposed else self.product.grad_input
        return multiply(grad, weight, constants)


class PackedExperts(nn.Module):
    """What a module of experts needs to know of its bytes; lives in it as ``packed``.

    Args:
        formats: by name of a parameter, a layer without memory that says how one expert's weight is stored.
        num_experts: E.
        transposed: the parameters are ``[E, in, out]``.
    """

    def __init__(self, formats: Mapping[str, QuantizedLinear], num_experts: int, *, transposed: bool) -> None:
        super().__init__()
        self.__dict__["formats"] = dict(formats)  # not submodules: they hold no weights
        self.num_experts, self.transposed = num_experts, transposed
        self.adapters: dict[str, ExpertAdapter] = {}
        for name, layer in formats.items():
            empty = torch.empty(num_experts, layer.constants.numel(), dtype=torch.uint8, device=layer.weight.device)
            self.register_buffer(constants_of(name), empty)

    formats: dict[str, QuantizedLinear]

    def in_out(self, name: str) -> tuple[int, int]:
        """Widths of one expert's weight."""
        layer = self.formats[name]
        sizes = layer.in_features, layer.out_features
        return sizes[::-1] if self.transposed else sizes

    def numel(self, name: str) -> int:
        """Weights of all experts together."""
        layer = self.formats[name]
        return self.num_experts * layer.in_features * layer.out_features

    def placeholder(self, name: str) -> nn.Parameter:
        """A parameter for the bytes, without memory."""
        layer = self.formats[name].weight
        empty = torch.empty(self.num_experts, *layer.shape, dtype=layer.dtype, device="meta")
        return nn.Parameter(empty, requires_grad=False)

    def stored(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise a dense parameter, expert by expert: bytes ``[E, rows, row_bytes]`` and constants."""
        rows, constants = zip(*(self.formats[name].stored(expert) for expert in weight), strict=True)
        return torch.stack(rows), torch.stack(constants)

    def expert(self, name: str, weight: Tensor, number: int) -> QuantizedLinear:
        """One expert of a parameter as a layer, which shares its bytes."""
        return self.formats[name].sharing(weight.detach()[number], getattr(self, constants_of(name))[number])

    def dequantize(self, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The dense parameter, in the family's own shape."""
        return torch.stack([self.expert(name, weight, n).dequantize(dtype) for n in range(self.num_experts)])

    def constants_finite(self, name: str, weight: Tensor) -> bool:
        """Whether no block constant of any expert is NaN or infinite."""
        return all(self.expert(name, weight, n).constants_finite() for n in range(self.num_experts))

    def multiply(self, name: str, x: Tensor, weight: Tensor, spans: tuple[ExpertTokens, ...]) -> Tensor:
        """Multiply ``[S, in]``, sorted by expert, by each token's expert: ``[S, out]``, in the dtype of ``x``."""
        x = autocast_input(x)
        layer, adapter = self.formats[name], self.adapters.get(name)
        weights = ExpertProduct(layer.product, self.in_out(name)[1], self.transposed)
        A, B, scaling = (None, None, 0.0) if adapter is None else (adapter.A, adapter.B, adapter.scaling)
        constants = getattr(self, constants_of(name))
        y: Tensor = ExpertsMatmul.apply(x, A, B, weight, constants, spans, weights, scaling)
        return y

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, transposed={self.transposed}, " + ", ".join(
            f"{name}: {layer.extra_repr()}" for name, layer in self.formats.items()
        )


def constants_of(name: str) -> str:
    """The buffer that holds what the rows of each expert share."""
    return f"{name}_constants"


def packed_experts(module: nn.Module) -> PackedExperts | None:
    """What a module of experts knows of its bytes; None where its experts are dense, or it has none."""
    found = dict(module.named_children()).get("packed")
    return found if isinstance(found, PackedExperts) else None


def spans_of(expert_ids: Tensor, num_experts: int) -> tuple[ExpertTokens, ...]:
    """Where each expert's tokens lie in a sorted list of expert numbers.

    Args:
        expert_ids: ``[S]``, ascending; a number from E on belongs to no expert.
    """
    counts = torch.bincount(expert_ids, minlength=num_experts).tolist()
    spans, start = [], 0
    for expert, count in enumerate(counts[:num_experts]):
        if count:
            spans.append(ExpertTokens(expert, start, start + count))
        start += count
    return tuple(spans)
