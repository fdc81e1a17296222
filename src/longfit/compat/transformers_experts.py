"""The private names of transformers' experts interface that longfit uses, one function each.

transformers 5 keeps the experts of a layer in stacked parameters and computes them by a function that is chosen by name
(``use_experts_implementation``), as attention is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What ``torch.nn.functional.grouped_mm`` multiplies."""


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module of stacked experts computes, as ``use_experts_implementation`` records it.

    Attributes:
        weights: names of its parameters ``[E, out, in]`` (or ``[E, in, out]``), in the order of use.
        transposed: they are ``[E, in, out]``.
        biased: each has a parameter of the same name and ``_bias``, ``[E, out]``.
        gated: the first makes gate and up together.
        normed: a norm follows the last.
    """

    weights: tuple[str, str]
    transposed: bool
    biased: bool
    gated: bool
    normed: bool


def experts_layout(module: nn.Module) -> ExpertsLayout | None:
    """Return how a module of stacked experts computes; None for one that the interface does not serve."""
    told: dict[str, Any] = vars(module)
    if not hasattr(type(module).forward, "__wrapped__") or "has_gate" not in told:
        return None
    gated = bool(told["has_gate"])
    return ExpertsLayout(
        weights=("gate_up_proj" if gated else "up_proj", "down_proj"),
        transposed=bool(told["is_transposed"]),
        biased=bool(told["has_bias"]),
        gated=gated,
        normed=bool(told["has_post_expert_norm"]),
    )


def apply_gate(experts: Any, gate_up: Tensor) -> Tensor:
    """Compute a family's gated activation: ``[S, 2 I]`` to ``[S, I]``."""
    gated: Tensor = experts._apply_gate(gate_up)
    return gated


def register_experts(name: str, function: Callable[..., Tensor]) -> None:
    """Register ``function(module, hidden, top_k_index, top_k_weights)`` as a way to compute modules of experts."""
    ALL_EXPERTS_FUNCTIONS.register(name, function)


def choose_experts(module: Any, name: str) -> None:
    """Let a module of experts, and all that share its configuration, be computed by a registered function."""
    module.config._experts_implementation = name


def dense_experts_forward(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute a module of dense experts as transformers does by itself: grouped, or where torch has no grouped product
    for the dtype as the family writes it."""
    if hidden.dtype in GROUPED_DTYPES:
        grouped: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden, top_k_index, top_k_weights)
        return grouped
    original: Any = type(module).forward
    y: Tensor = original.__wrapped__(module, hidden, top_k_index, top_k_weights)
    return y
