"""The function by which transformers computes a module of experts whose weights are in few bits.

It does what transformers' own ``grouped_mm`` does (sort the tokens by expert, multiply, gate, multiply, sum a token's
experts), with products that read the packed experts. Biases, gate and a norm behind the experts are the family's own. A
module of the same model whose experts stayed dense is left to transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longfit.compat.transformers_experts import ExpertsLayout, apply_gate, dense_experts_forward, experts_layout
from longfit.layers.experts import packed_experts, spans_of

NAME = "longfit"
"""Of this function in transformers' experts interface."""


def experts_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Send each token through its experts.

    Args:
        module: a module of experts of a transformers model.
        hidden: ``[N, H]``.
        top_k_index: ``[N, K]``, each token's experts.
        top_k_weights: ``[N, K]``, their shares.
    Returns: ``[N, H]``.
    """
    packed, layout = packed_experts(module), experts_layout(module)
    if packed is None or layout is None:
        return dense_experts_forward(module, hidden, top_k_index, top_k_weights)
    num_tokens, top_k = top_k_index.shape
    expert_ids, order = torch.sort(top_k_index.reshape(-1), stable=True)  # [N K]
    spans = spans_of(expert_ids, packed.num_experts)
    x = hidden[order // top_k]
    first, last = layout.weights
    y = _biased(module, first, packed.multiply(first, x, getattr(module, first), spans), expert_ids, layout)
    y = apply_gate(module, y) if layout.gated else module.act_fn(y)
    y = _biased(module, last, packed.multiply(last, y, getattr(module, last), spans), expert_ids, layout)
    if layout.normed:
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return y[back].view(num_tokens, top_k, -1).sum(dim=1).to(hidden.dtype)


def _biased(module: nn.Module, name: str, y: Tensor, expert_ids: Tensor, layout: ExpertsLayout) -> Tensor:
    if not layout.biased:
        return y
    bias: Tensor = getattr(module, f"{name}_bias")
    return y + bias[expert_ids.clamp(max=len(bias) - 1)].to(y.dtype)
