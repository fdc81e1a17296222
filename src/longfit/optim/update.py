"""One AdamW update of one run of elements: the reference that every kernel must repeat bit for bit.

Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2, written as
torch.optim.AdamW runs it: the weights decay first, then the moments move, then the step is taken:

    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + ((1 - beta2) * g) * g
    p = p - (step_size * m) / (sqrt(v) * root_scale + eps)
    with step_size = lr / (1 - beta1 ** t) and root_scale = 1 / sqrt(1 - beta2 ** t)

Every ``*``, ``+``, ``-``, ``/`` and ``sqrt`` above is one rounding in the state's precision, in the order of the
parentheses and never fused: that order is the contract that makes a trajectory the same on every backend.

What it is not: it knows nothing of parameters, pages or param groups; it sees runs of elements, small enough for the
cache, so its temporaries are small too.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LOW_16 = 0xFFFF
_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class StepScalars:
    """The numbers of one step that are the same for every element, computed once in double precision."""

    decay: float  # 1 - lr * weight_decay
    beta1: float
    grad_weight: float  # 1 - beta1
    beta2: float
    square_weight: float  # 1 - beta2
    step_size: float  # lr / (1 - beta1 ** step)
    root_scale: float  # 1 / sqrt(1 - beta2 ** step)
    eps: float


def step_scalars(step: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> StepScalars:
    """Return the scalars of step number ``step``, which counts from 1."""
    beta1, beta2 = betas
    return StepScalars(
        decay=1 - lr * weight_decay,
        beta1=beta1,
        grad_weight=1 - beta1,
        beta2=beta2,
        square_weight=1 - beta2,
        step_size=lr / (1 - beta1**step),
        root_scale=1 / math.sqrt(1 - beta2**step),
        eps=eps,
    )


def adamw_update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: StepScalars) -> None:
    """Move ``param``, ``exp_avg`` and ``exp_avg_sq`` by one step, in place.

    Args:
        param: ``[n]`` float32 or float64, the weights or their masters.
        grad: ``[n]``, same dtype. A NaN or an infinity makes its own element NaN, as in torch.
        exp_avg, exp_avg_sq: ``[n]``, same dtype, the first and second moment.
    """
    param.mul_(scalars.decay)
    exp_avg.mul_(scalars.beta1).add_(grad * scalars.grad_weight)
    exp_avg_sq.mul_(scalars.beta2).add_((grad * scalars.square_weight).mul_(grad))
    denominator = exp_avg_sq.sqrt().mul_(scalars.root_scale).add_(scalars.eps)
    param.sub_((exp_avg * scalars.step_size).div_(denominator))


def refresh_master(master: Tensor, param: Tensor) -> None:
    """Take the parameter's value wherever the master no longer rounds to it.

    After every step the parameter is its master, rounded; so a master that rounds to something else is either new
    (zeros) or out of date, because someone loaded, clamped or averaged the parameter in between. The rule costs one
    comparison an element, makes initialisation unnecessary and never lets an old master undo a load.

    Args:
        master: ``[n]`` float32, changed in place.
        param: ``[n]`` bfloat16 or float16.
    """
    torch.where(master.to(param.dtype) == param, master, param.to(master.dtype), out=master)


def round_stochastically(values: Tensor, *, key: int, start: int) -> Tensor:
    """Round float32 to bfloat16, up or down with probabilities that keep the mean.

    The random bits are a hash of the element's number and ``key``, not a stream: whoever rounds element ``i`` of step
    ``t`` draws the same bits, whatever the page, the order or the backend. (Element numbers count modulo 2 ** 32.)

    Args:
        values: ``[n]`` float32; NaN and infinities are kept.
        key: 32 random bits for this parameter and step, from ``rounding_key``.
        start: the number of the first element within its parameter.
    Returns: ``[n]`` bfloat16.
    """
    number = torch.arange(start, start + values.numel(), device=values.device)  # [n] int64
    up = (_hash32(number ^ key) & _LOW_16).to(torch.int32)
    rounded = (values.view(torch.int32) + up).bitwise_and_(~_LOW_16).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def rounding_key(seed: int, *, param: int, step: int) -> int:
    """Return the 32 bits that set one parameter's rounding in one step apart from all others."""
    key = seed & _LOW_32
    for part in (param, step):
        key = _mix32((key ^ part) & _LOW_32)
    return key


def _hash32(number: Tensor) -> Tensor:
    """``_mix32`` of every element; int64 products wrap, and their low 32 bits are exact."""
    number = number & _LOW_32
    number = ((number ^ (number >> 16)) * 0x7FEB352D) & _LOW_32
    number = ((number ^ (number >> 15)) * 0x846CA68B) & _LOW_32
    return number ^ (number >> 16)


def _mix32(number: int) -> int:
    """Wellons' lowbias32, the 32-bit integer hash with the least known bias for two multiplications."""
    number = ((number ^ (number >> 16)) * 0x7FEB352D) & _LOW_32
    number = ((number ^ (number >> 15)) * 0x846CA68B) & _LOW_32
    return number ^ (number >> 16)
