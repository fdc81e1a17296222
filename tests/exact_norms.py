"""Makes the norms of a float64 model float64: transformers computes every RMS norm in float32, whatever the dtype.

Without this, two mathematically equal ways to add up a norm's gradient differ by float32 rounding (6e-8), and no test
could tell an error of 1e-9 from it.
"""

from typing import Any

import torch
from torch import Tensor, nn


def exact_norms(model: nn.Module) -> nn.Module:
    """Let each RMS norm answer with the same formula in the dtype of its input; returns the model."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.register_forward_hook(_same_norm_without_casts)
    return model


def _same_norm_without_casts(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = args[0]
    epsilon = module.eps if "eps" in vars(module) else module.variance_epsilon
    gain = 1.0 + module.weight if type(module).__name__.startswith("Gemma") else module.weight
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))
