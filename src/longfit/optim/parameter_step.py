"""One step of AdamW on runs of elements: what a parameter contributes to it, and the calls of the kernel."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longfit.kernels.dispatch import adamw_step
from longfit.numerics.adamw import AdamwState, AdamwUpdate, StepScalars, step_scalars
from longfit.optim.elements import put, take
from longfit.optim.page_layout import ParameterRun


@dataclass(frozen=True)
class ParameterStep:
    """What one parameter contributes to one step."""

    param: Tensor
    grad: Tensor
    scalars: StepScalars
    rounding_key: int


def scalars_of(group: dict[str, Any], step: int) -> StepScalars:
    """The numbers of one step that all elements of a param group share."""
    return step_scalars(
        step, lr=float(group["lr"]), betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"]
    )


def step_runs(states: list[tuple[ParameterRun, AdamwState]], parts: dict[int, ParameterStep]) -> None:
    """Step the parameters' elements that lie in some pages.

    Args:
        states: runs of elements and their state, of parameters in ``parts``.
        parts: by the number of the parameter.
    """
    updates = []
    for run, state in states:
        part = parts[run.param]
        param, grad = take(part.param, run.start, run.stop), take(part.grad, run.start, run.stop)
        update = AdamwUpdate(param, grad, state, part.scalars, part.rounding_key, run.start)
        if part.param.is_contiguous() and part.grad.is_contiguous():
            updates.append(update)
        else:  # copies: stepped at once, so that no more than one run's are alive
            adamw_step([update])
            if not part.param.is_contiguous():
                put(part.param, run.start, run.stop, param)
    adamw_step(updates)
