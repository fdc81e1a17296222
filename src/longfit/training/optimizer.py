"""The one place where a run's optimiser is made, and what happens to gradients just before it steps."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from longfit.config import RunConfig
from longfit.errors import ConfigError
from longfit.optim.adamw import PagedAdamW


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: matrices decay, vectors (norms, biases) do not.

    Returns: one or two groups with ``params`` and ``weight_decay``, parameters in the model's order.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(config: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make the optimiser that the config asks for.

    torch's fused AdamW where every parameter is 32-bit, as adapters are; `PagedAdamW`, which keeps float32 masters,
    where embeddings or norms of a 16-bit base are trained.

    Args:
        config: its ``optim`` section decides; ``train.learning_rate`` is the peak.
        groups: from `parameter_groups`.
    Raises: ConfigError: the settings ask for state that this version does not have.
    """
    optim, peak = config.optim, config.train.learning_rate
    if optim.optim != "adamw" or optim.budget is not None:
        raise ConfigError("optim: this version has no paged or 8-bit state yet; use --optim adamw and no budget")
    if all(parameter.dtype in (torch.float32, torch.float64) for group in groups for parameter in group["params"]):
        return torch.optim.AdamW(groups, lr=peak, betas=optim.betas, fused=True)
    return PagedAdamW(groups, lr=peak, betas=optim.betas)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients so that their global norm is at most ``max_norm``; sums in float32 whatever their dtype.

    Returns: the norm before clipping.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    norms = [torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)) for grad in gradients]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms])).item()
    if total > max_norm:
        torch._foreach_mul_(gradients, max_norm / total)
    return total
