"""The learning rate as a pure function of the step: linear warm-up, then cosine to zero or constant.

A function of the step has no state: nothing about it needs saving, and a resumed run cannot drift from an unbroken one.
"""

import math
from typing import Literal


def learning_rate(
    step: int,
    peak: float,
    *,
    total_steps: int,
    warmup_steps: int,
    schedule: Literal["cosine", "constant"] = "cosine",
) -> float:
    """Return the learning rate of one optimiser step.

    Args:
        step: from 0.
        peak: learning rate at the end of the warm-up.
        total_steps: steps of the run; cosine would reach zero right after the last one.
        warmup_steps: steps of linear warm-up; the first has ``peak / warmup_steps``, not zero.
        schedule: what follows the warm-up.
    Raises: ValueError: ``step`` is not one of the run's steps.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step}: must be from 0 to {total_steps - 1}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
