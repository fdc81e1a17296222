"""Loss scaling for float16: gradients are made large enough for its range and taken back before they are used.

float16 holds nothing below 6e-8 and loses digits below 6e-5, where the gradients of a long context lie (they are
divided by its number of tokens). So the loss is multiplied by a power of two, and the gradients are divided by it
(Micikevicius et al., "Mixed Precision Training", 2018, section 3.2). When a gradient overflows, the step is taken again
from the same windows with half the scale; a run loses no data to it. bfloat16 and float32 have scale 1, which changes
nothing.

Once divided, a gradient is float32. Those of adapters are from the start. Norms and embeddings that train whole are
float16 parameters (their float32 masters are the optimiser's), and torch would give them float16 gradients: the scale
taken out of these would bring back what it was there to prevent, and the sum of a norm's gradient over all tokens
overflows long before the gradient of any token does. So they collect in float32 (``Tensor.grad_dtype``), as far as what
adds them up allows.

The scale is part of the run's state and grows at fixed step numbers, so that a resumed run goes on as it would have.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

FIRST = 65536.0
LARGEST = 2.0**24
SMALLEST = 2.0  # still float16: above 1, which stands for no scaling
GROWTH_STEPS = 200  # steps between attempts at twice the scale


def first_scale(dtype: torch.dtype) -> float:
    """Return the scale a run begins with, by the dtype its layers compute in."""
    return FIRST if dtype == torch.float16 else 1.0


def after_overflow(scale: float) -> float | None:
    """Return the scale to try again with; None if scaling is not to blame."""
    return scale / 2 if scale > SMALLEST else None


def after_step(scale: float, step: int) -> float:
    """Return the scale of the step after number ``step``, which counts from 1."""
    return min(scale * 2, LARGEST) if scale > 1 and step % GROWTH_STEPS == 0 else scale


def begin(parameters: Iterable[Tensor], *, num_processes: int) -> None:
    """Drop all gradients, and let float16 parameters collect the next ones in float32.

    Args:
        num_processes: with more than one, gradients stay float16 until `widen`, as the buckets of torch's
            DistributedDataParallel have the dtype of the parameter.
    """
    for parameter in parameters:
        parameter.grad = None
        if parameter.dtype == torch.float16:
            parameter.grad_dtype = torch.float32 if num_processes == 1 else parameter.dtype


def widen(parameters: Iterable[Tensor]) -> None:
    """Make float16 gradients float32, before their scale is taken out."""
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.dtype == torch.float16:
            parameter.grad = None
            parameter.grad_dtype = torch.float32
            parameter.grad = gradient.float()


def describe(scale: float, *, on_card: bool) -> str | None:
    """Return the sentence that a run says about its scale; None if it has none."""
    if scale == 1:
        return None
    why = "this card has no bfloat16" if on_card else "as model.dtype asks"
    return (
        f"computing in float16 ({why}): the loss is scaled by {scale:,.0f}; a step whose gradients overflow is taken "
        "again with half of it"
    )
