"""The levels that codes stand for: NF4 and its rivals FP4 and INT4, and the 8-bit maps (QLoRA, section 3).

A codebook is a float32 vector of levels; a code is an index into it, in the order of the file format, which need not be
ascending. NF4 holds the levels that a normally distributed weight reaches about equally often: quantiles of N(0, 1),
computed apart for the negative and the positive half so that 0 is a level (zeros and padding stay exact), scaled to
[-1, 1]. `normal_float_4` is that construction. The literal `NF4` is what every checkpoint was written with; it
differs from the construction by up to 4.3e-8 (the rounding of other arithmetic), so the literal is the one used.

The functions return new tensors; nothing here can be changed by a caller.
"""

from functools import cache

import torch
from torch import Tensor

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Sign, two exponent bits, one mantissa bit (E2M1), divided by the largest magnitude, 12. The code is the bit pattern of
# bitsandbytes, whose exponents are not in order of size. Code 8, the sign bit alone, is written as +0 there and here.
_E2M1 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(level / 12 for level in _E2M1) + tuple(0.0 - level / 12 for level in _E2M1)

# Integers -7..7 over 7, the code being the two's complement nibble. Code 8 would be -8/7 and is never written, as no
# value lies beyond -1: the symmetric grid keeps 0 exact and the codes of x and -x opposite, as 8-bit absmax does.
INT4 = tuple((code - 16 if code >= 8 else code) / 7 for code in range(16))

QUANT_TYPES = {"nf4": NF4, "fp4": FP4, "int4": INT4}

# The probability whose quantile becomes level 1.0, as the quantile of probability 1 is infinite: the mean of 1 - 1/32
# and 1 - 1/30, half a step inside grids of 16 and 15 levels. NF4 was made with these seven digits and with fp32
# probabilities; all digits and fp64 would move its levels by up to 1.9e-7.
_NF4_OUTERMOST = 0.9677083


def codebook(quant_type: str, *, device: torch.device | str = "cpu") -> Tensor:
    """Return the 16 levels of a 4-bit type in code order.

    Args:
        quant_type: "nf4", "fp4" or "int4".
        device: where to put them; given, so that a surrounding ``torch.device("meta")`` has no effect.
    Returns: fp32 ``[16]``.
    Raises: ValueError: unknown type.
    """
    if quant_type not in QUANT_TYPES:
        raise ValueError(f'quant_type: got {quant_type!r}; allowed: {", ".join(QUANT_TYPES)}; try quant_type="nf4"')
    return torch.tensor(QUANT_TYPES[quant_type], dtype=torch.float32, device=device)


def normal_float_4() -> Tensor:
    """Build NF4 from the quantiles of N(0, 1) (QLoRA, section 3, "4-bit NormalFloat Quantization").

    Eight positive levels, from evenly spaced probabilities between the outermost one and 1/2; seven negative levels in
    the same way on the coarser grid; the probability 1/2 itself, level 0, is dropped from both halves and added once.

    Returns: fp64 ``[16]``, ascending, in [-1, 1]; equal to `NF4` to 1e-7.
    """
    positive, negative = _upper_quantiles(8), -_upper_quantiles(7)
    levels = torch.cat([negative, positive.new_zeros(1), positive.flip(0)])
    return levels / levels.max()


def _upper_quantiles(num_levels: int) -> Tensor:
    """Return quantiles of N(0, 1) from the outermost probability down to just above 1/2: fp64, descending."""
    probabilities = torch.linspace(_NF4_OUTERMOST, 0.5, num_levels + 1, dtype=torch.float32, device="cpu")[:-1]
    return torch.special.ndtri(probabilities.double())


def dynamic_map(signed: bool, *, device: torch.device | str = "cpu") -> Tensor:
    """Return the 8-bit dynamic map: seven decades, each with twice the levels of the one below (Dettmers, 2015).

    Signed, it holds the block constants of double quantisation and Adam's first moment; unsigned, Adam's second moment.
    The fp32 bytes equal those of bitsandbytes' ``create_dynamic_map``.

    Args:
        signed: levels on both sides of 0 (but 1.0 without -1.0), or on the positive side alone.
        device: where to put them.
    Returns: fp32 ``[256]``, ascending.
    """
    return torch.tensor(_dynamic_levels(signed), dtype=torch.float32, device=device)


@cache
def _dynamic_levels(signed: bool) -> tuple[float, ...]:
    levels = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, steps + 1, dtype=torch.float32, device="cpu")
        centres = (edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6)
        levels += centres.tolist()
        if signed:
            levels += (-centres).tolist()
    return tuple(sorted(levels))
