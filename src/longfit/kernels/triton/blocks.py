"""What the Triton kernels share: the rules of ``numerics/blockwise.py`` on a tile of blocks held in registers.

Every product, quotient and root is one IEEE rounding. Triton's ``/`` is not (it may be 2 ulp off), ``div_rn`` is; and
every kernel is launched with ``enable_fp_fusion=False``, or the compiler would fuse products with sums.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from longfit.numerics.blockwise import SMALLEST_ABSMAX, thresholds
from longfit.numerics.codebooks import codebook, dynamic_map

SMALLEST = tl.constexpr(SMALLEST_ABSMAX)


@triton.jit
def load_float(pointer, mask):
    """Load little-endian fp32 values from byte addresses of any alignment: block constants may begin anywhere."""
    bits = tl.load(pointer, mask=mask, other=0).to(tl.uint32)
    bits |= tl.load(pointer + 1, mask=mask, other=0).to(tl.uint32) << 8
    bits |= tl.load(pointer + 2, mask=mask, other=0).to(tl.uint32) << 16
    bits |= tl.load(pointer + 3, mask=mask, other=0).to(tl.uint32) << 24
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def largest_magnitude(values):
    """Return the largest magnitude along axis 1, and whether all values are finite: reductions may skip NaN."""
    magnitudes = tl.abs(values)
    finite = magnitudes < float("inf")
    broken = tl.max(tl.where(finite, 0, 1), axis=1)
    return tl.max(tl.where(finite, magnitudes, 0.0), axis=1), broken


@triton.jit
def scale_to_one(values, absmax):
    """Return ``clamp(values * (1 / max(absmax, 1e-38)), -1, 1)``; NaN stays NaN."""
    smallest = tl.full(absmax.shape, SMALLEST, tl.float32)  # as a literal it would be fp64: it is below fp32's normals
    reciprocal = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), tl.maximum(absmax, smallest))
    scaled = values * tl.where(absmax == absmax, reciprocal, absmax)
    scaled = tl.where(scaled > 1.0, 1.0, scaled)
    return tl.where(scaled < -1.0, -1.0, scaled)


@triton.jit
def nearest_rank(scaled, thresholds, BITS: tl.constexpr):
    """Count the thresholds, ``2 ** BITS - 1`` ascending ones, strictly below each value; NaN is above all of them."""
    rank = tl.zeros(scaled.shape, tl.int32)
    for bit in tl.static_range(BITS):
        step = 1 << (BITS - 1 - bit)
        threshold = tl.load(thresholds + rank + (step - 1))
        rank += tl.where(scaled <= threshold, 0, step)
    return rank


def search_tables(levels: Tensor, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return what `nearest_rank` searches.

    Args:
        levels: fp32 ``[2..256]`` in any order.
        device: where to put the tables.
    Returns: fp32 thresholds ``[2 ** bits - 1]``, filled up with infinity; the code of each rank, uint8 ``[2 ** bits]``,
        filled up with the highest level's; bits.
    """
    between, code_of_rank = thresholds(levels, levels.device)
    bits = (code_of_rank.numel() - 1).bit_length()
    missing = 2**bits - code_of_rank.numel()
    between = torch.cat([between, between.new_full((missing,), float("inf"))])
    code_of_rank = torch.cat([code_of_rank, code_of_rank[-1:].expand(missing)])
    return between.to(device), code_of_rank.to(device), bits


@cache
def levels_of(name: str, device: torch.device) -> Tensor:
    """Return a codebook by name: a 4-bit type, or how block constants are stored. Kept, so that a graph can capture."""
    maps = {"dynamic8": lambda: dynamic_map(signed=True), "moment2": _unsigned}
    return (maps[name]() if name in maps else codebook(name)).to(device)


@cache
def tables_of(name: str, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return `search_tables` of a codebook by name; kept."""
    return search_tables(levels_of(name, torch.device("cpu")), device)


def _unsigned() -> Tensor:
    return dynamic_map(signed=False)
