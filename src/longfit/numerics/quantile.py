"""Quantile quantisation: levels estimated from data, so that every code is used equally often (QLoRA, section 3).

The information-theoretically best data type spends each of its k codes on 1/k of the values. The edges of its bins are
then the quantiles at 0, 1/k, 2/k, ... 1 of the values, and a level lies half-way between the edges of its bin
(equation 4).
NF4 is this idea for N(0, 1), computed once for all tensors and given an exact zero (`codebooks.py`).

    edges = quantile_edges(weight, num_levels=16, block_size=64)      of the weight scaled by its block absmax
    codes, absmax = quantize_blockwise(weight, quantile_codebook(edges), block_size=64)

Rounding to the nearest level puts the thresholds half-way between levels, which is close to the edges but not on them:
`torch.bucketize(scaled, edges[1:-1])` uses the codes exactly equally often; `quantize_blockwise`, on normal values,
uses the inner ones equally to some 15 % and the two outermost a quarter less. Unlike NF4 there is no level 0, so zeros
and padding do not stay exact.
"""

import torch
from torch import Tensor

from longfit.numerics.absmax import block_absmax, check_block_size, flatten_floats, in_blocks
from longfit.numerics.blockwise import SMALLEST_ABSMAX

# Values looked at. A quantile estimated from n values is off by at most 1 / (2 sqrt(n)) in probability (one sigma): for
# 2^22 values 0.4 % of a bin of 16.
SAMPLE_NUMEL = 1 << 22


def quantile_edges(values: Tensor, *, num_levels: int = 16, block_size: int = 64) -> Tensor:
    """Estimate the edges between which block-scaled values are equally likely to fall.

    Large tensors are represented by evenly spaced whole blocks, so the estimate is the same every time.

    Args:
        values: any shape, fp16, bf16, fp32 or fp64.
        num_levels: bins, 2 to 256.
        block_size: values per absmax, by which they are scaled to [-1, 1].
    Returns: fp32 ``[num_levels + 1]``, ascending, from the smallest to the largest scaled value.
    Raises: TypeError: not a float tensor. ValueError: no values, or a NaN or an infinity among them; a bad size.
    """
    if not 2 <= num_levels <= 256:
        raise ValueError(f"num_levels: got {num_levels}; allowed: 2 to 256, as a code is at most one byte; try 16")
    scaled = block_scaled_sample(values, block_size=block_size)
    if scaled.numel() == 0 or not bool(scaled.isfinite().all()):
        raise ValueError("values: got none, or a NaN or an infinity among them; quantiles need finite values")
    ascending = scaled.double().sort().values
    place = torch.linspace(0, scaled.numel() - 1, num_levels + 1, dtype=torch.float64, device=scaled.device)
    below, above = ascending[place.floor().long()], ascending[place.ceil().long()]
    return torch.lerp(below, above, place.frac()).float()


def quantile_codebook(edges: Tensor) -> Tensor:
    """Return the level half-way between the edges of each bin (QLoRA, equation 4).

    Args:
        edges: fp32 ``[num_levels + 1]``, ascending.
    Returns: fp32 ``[num_levels]``, ascending, for use in `quantize_blockwise`.
    """
    return (edges[:-1] + edges[1:]) / 2


def block_scaled_sample(values: Tensor, *, block_size: int) -> Tensor:
    """Return values divided by their block's absmax, about `SAMPLE_NUMEL` of them at most: fp32 ``[n]`` in [-1, 1]."""
    flat = flatten_floats(values)
    check_block_size(block_size)
    step = -(-flat.numel() // SAMPLE_NUMEL)
    if step > 1 and flat.numel() >= block_size:
        whole_blocks = flat[: flat.numel() // block_size * block_size].view(-1, block_size)
        flat = whole_blocks[::step].reshape(-1)
    blocks = in_blocks(flat, block_size)
    scaled = blocks * block_absmax(blocks).clamp(min=SMALLEST_ABSMAX).reciprocal().unsqueeze(1)
    return scaled.view(-1)[: flat.numel()]
