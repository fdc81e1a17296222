"""Stochastic rounding to bfloat16: up or down at random, so that the mean of many small steps is not lost.

A bfloat16 weight near 1 is a multiple of 1/128; a step of 2e-5 rounds to nothing, however often it is repeated. Rounded
up with probability 2e-5 * 128 it arrives on average. The random bits are a hash of the element's number and a key for
the parameter and the step, not a stream: whoever rounds element ``i`` draws the same bits, whatever the order, the
thread or the backend.

What it is not: a substitute for float32 masters where their memory is there; each weight carries noise of its last bit.
"""

import torch
from torch import Tensor

_LOW_16 = 0xFFFF
_LOW_32 = 0xFFFFFFFF


def round_stochastically(values: Tensor, *, key: int, start: int = 0) -> Tensor:
    """Round to one of the two bfloat16 neighbours, with probabilities that keep the mean.

    Args:
        values: fp32 ``[n]``; NaN and infinities are kept.
        key: 32 random bits, from ``rounding_key``.
        start: the number of the first element; numbers count modulo 2 ** 32.
    Returns: bf16 ``[n]``.
    """
    number = torch.arange(start, start + values.numel(), device=values.device)  # [n] int64
    up = (_hash_32((number ^ key) & _LOW_32) & _LOW_16).to(torch.int32)
    rounded = (values.view(torch.int32) + up).bitwise_and_(~_LOW_16).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def rounding_key(seed: int, *, param: int, step: int) -> int:
    """Return the 32 bits that set one parameter's rounding in one step apart from all others.

    Args:
        seed: any integer; its low 32 bits count.
        param: the parameter's number in the optimiser.
        step: the step's number.
    """
    key = seed & _LOW_32
    for part in (param, step):
        key = int(_hash_32(torch.tensor((key ^ part) & _LOW_32)))
    return key


def _hash_32(number: Tensor) -> Tensor:
    """Hash 32-bit numbers held in int64 (Wellons' lowbias32). Products wrap at 64 bits, so their low 32 are exact."""
    number = ((number ^ (number >> 16)) * 0x7FEB352D) & _LOW_32
    number = ((number ^ (number >> 15)) * 0x846CA68B) & _LOW_32
    return number ^ (number >> 16)
