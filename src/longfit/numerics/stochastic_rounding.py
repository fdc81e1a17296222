"""Stochastic rounding to bfloat16: up or down at random, so that the mean of many small steps is not lost.

A bfloat16 weight near 1 is a multiple of 1/128; a step of 2e-5 rounds to nothing, however often it is repeated. Rounded
up with probability 2e-5 * 128 it arrives on average. The random bits are a hash of the element's number and a key for
the parameter and the step, not a stream: whoever rounds element ``i`` draws the same bits, whatever the order, the
thread or the backend.

What it is not: a substitute for float32 masters where their memory is there; each weight carries noise of its last bit.
"""

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", int, Tensor)

_GOLDEN = 0x9E3779B9  # 2 ** 32 over the golden ratio: keeps the hash away from 0, which it would leave as it is
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
    key = 0
    for part in (seed, param, step):
        key = _hash_32((key + _GOLDEN + part) & _LOW_32)
    return key


def _hash_32(number: T) -> T:
    """Hash a 32-bit number, or a tensor of them in int64 (Wellons' lowbias32).

    Products of int64 wrap at 64 bits, so that their low 32 are exact.
    """
    number = ((number ^ (number >> 16)) * 0x7FEB352D) & _LOW_32
    number = ((number ^ (number >> 15)) * 0x846CA68B) & _LOW_32
    return number ^ (number >> 16)
