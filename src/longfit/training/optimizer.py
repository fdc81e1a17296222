"""The one place where a run's optimiser is made, and what happens to gradients just before it steps."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from longfit.compat.torch import multiply_all_
from longfit.config import RunConfig
from longfit.optim.adamw import PagedAdamW
from longfit.parallel.shard import Shards
from longfit.training import loss_scale

NORM_PART = 1 << 22
"""Numbers of a gradient whose squares are summed at once: 16 MB of float32 at a time, and few calls. Not tuned."""


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


def make_optimizer(
    config: RunConfig, groups: list[dict[str, Any]], *, run_id: str, process: int | None = None
) -> torch.optim.Optimizer:
    """Make the optimiser that the config asks for.

    `PagedAdamW` always, so that a budget changes where the state lies and no bit of it: torch's fused AdamW rounds
    otherwise and differs in the last bit of every twentieth number.

    Args:
        config: its ``optim`` section decides; ``train.learning_rate`` is the peak.
        groups: from `parameter_groups`.
        run_id: whose state ``optim.file`` holds; a file of another run is refused.
        process: this process's number where there are several, each with a file of its own; it ends the file's name.
    Raises: ConfigError, PagingError: as `PagedAdamW`.
    """
    optim, peak = config.optim, config.train.learning_rate
    suffix = "" if process is None else f".{process}"
    return PagedAdamW(
        groups,
        lr=peak,
        betas=optim.betas,
        state_bits=8 if optim.optim == "adamw8bit" else 32,
        budget_bytes=optim.budget,
        path=None if optim.file is None else f"{optim.file}{suffix}",
        run=f"{run_id}{suffix}",
    )


def relieve(optimizer: torch.optim.Optimizer, function: Callable[[], float]) -> float:
    """Call what allocates beside the optimiser; if memory runs out, paged state makes room and it is called once more.

    Args:
        function: begins with gradients of its own making, as it may run twice.
    """
    return float(optimizer.relieve(function)) if isinstance(optimizer, PagedAdamW) else function()


def discard_file(optimizer: torch.optim.Optimizer) -> None:
    """Remove the file of paged state; the checkpoints have copies."""
    if isinstance(optimizer, PagedAdamW):
        optimizer.discard()


class PagingMeter:
    """Where paged state is, and what moving it has cost since the last reading, for ``metrics.jsonl``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer if isinstance(optimizer, PagedAdamW) else None
        self._before = self._optimizer.paging_statistics() if self._optimizer is not None else None

    def read(self) -> dict[str, float]:
        """Return resident and paged bytes, and bytes and seconds of moving; nothing for torch's AdamW."""
        if self._optimizer is None or self._before is None:
            return {}
        before, self._before = self._before, self._optimizer.paging_statistics()
        return {
            "optim_resident_bytes": self._before.resident_bytes,
            "optim_paged_bytes": self._before.paged_bytes,
            "optim_moved_bytes": self._before.moved_bytes - before.moved_bytes,
            "optim_moved_s": self._before.moved_s - before.moved_s,
        }


def _norm(gradient: Tensor) -> Tensor:
    """The norm of one gradient, in parts: torch makes a float32 copy of all that it sums of a narrow tensor."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    parts = [torch.linalg.vector_norm(part, dtype=wide) for part in gradient.reshape(-1).split(NORM_PART)]
    return torch.linalg.vector_norm(torch.stack(parts))


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[Tensor], max_norm: float, *, scale: float = 1.0, shards: Shards | None = None
) -> float:
    """Scale all gradients so that their global norm is at most ``max_norm``; sums in float32 whatever their dtype.

    Args:
        parameters: their ``.grad`` is changed in place, unless the norm is not finite; a float16 one becomes float32,
            for without its scale it would be too small for float16.
        max_norm: the largest norm.
        scale: what the loss was multiplied by (`loss_scale.py`); it is taken out of the gradients and of the norm.
        shards: what this process has of the model, where that is rows only; the norm is over all processes then.
    Returns: the norm before clipping.
    """
    parameters = list(parameters)
    loss_scale.widen(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if shards is not None:
        total = math.sqrt(shards.square_norm())
    elif not gradients:
        return 0.0
    else:
        norms = [_norm(gradient).double() for gradient in gradients]
        total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])).item()
    total /= scale
    factor = min(1.0, max_norm / total if total else 1.0) / scale
    if gradients and factor != 1.0 and math.isfinite(total):
        multiply_all_(gradients, factor)
    return total
