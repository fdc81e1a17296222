"""8-bit block-wise quantisation on a CUDA device, bit by bit as ``numerics/blockwise.py`` does it; any codebook.

It holds the block constants of double quantisation and the moments of 8-bit optimisers. Blocks may have any length: a
program walks over a block twice, first for its absmax, then for its codes, the second time from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longfit.kernels.triton.blocks import largest_magnitude, nearest_rank, scale_to_one, search_tables
from longfit.kernels.triton.device import kernel_dtype, on_device
from longfit.numerics.absmax import num_blocks

_WIDTH = 1024  # values a program handles at a time


@triton.jit
def _quantize(
    values, codes, absmax, thresholds, code_of_rank, numel, block_size, BITS: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS)
    column = tl.arange(0, WIDTH)[None, :]
    first = block[:, None] * block_size
    largest = tl.zeros((NUM_BLOCKS,), tl.float32)
    broken = tl.zeros((NUM_BLOCKS,), tl.int32)
    for start in range(0, block_size, WIDTH):
        inside = (start + column < block_size) & (first + start + column < numel)
        here = tl.load(values + first + start + column, mask=inside, other=0.0).to(tl.float32)
        largest_here, broken_here = largest_magnitude(here)
        largest = tl.maximum(largest, largest_here)
        broken |= broken_here
    largest = tl.where(broken != 0, float("nan"), largest)
    tl.store(absmax + block, largest, mask=block * block_size < numel)
    for start in range(0, block_size, WIDTH):
        inside = (start + column < block_size) & (first + start + column < numel)
        here = tl.load(values + first + start + column, mask=inside, other=0.0).to(tl.float32)
        rank = nearest_rank(scale_to_one(here, largest[:, None]), thresholds, BITS)
        tl.store(codes + first + start + column, tl.load(code_of_rank + rank), mask=inside)


@triton.jit
def _dequantize(codes, absmax, levels, out, numel, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = index < numel
    level = tl.load(levels + tl.load(codes + index, mask=inside, other=0).to(tl.int32))
    value = level * tl.load(absmax + index // BLOCK_SIZE, mask=inside, other=0.0)
    tl.store(out + index, value.to(out.dtype.element_ty), mask=inside)


def quantize_8bit(values: Tensor, codebook: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """See `longfit.numerics.blockwise.quantize_blockwise`."""
    return quantize_by_tables(values, search_tables(codebook, values.device), block_size=block_size)


def quantize_by_tables(values: Tensor, tables: tuple[Tensor, Tensor, int], *, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantise with the tables of a codebook, as `triton_blocks.search_tables` makes them; waits for nothing."""
    flat = values.detach().reshape(-1)
    flat = flat.to(kernel_dtype(flat.dtype, flat.device)).contiguous()
    width = min(_WIDTH, triton.next_power_of_2(block_size))
    blocks, per_program = num_blocks(flat.numel(), block_size), _WIDTH // width
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    thresholds, code_of_rank, bits = tables
    with on_device(flat):
        _quantize[(triton.cdiv(blocks, per_program),)](
            flat, codes, absmax, thresholds, code_of_rank, flat.numel(), block_size,
            BITS=bits, NUM_BLOCKS=per_program, WIDTH=width, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, *, block_size: int, dtype: torch.dtype) -> Tensor:
    """See `longfit.numerics.blockwise.dequantize_blockwise`."""
    codes, levels = codes.reshape(-1), codebook.to(codes.device).contiguous()
    out = torch.empty(codes.numel(), dtype=kernel_dtype(dtype, codes.device), device=codes.device)
    with on_device(out):
        _dequantize[(triton.cdiv(codes.numel(), _WIDTH),)](
            codes, absmax.contiguous(), levels, out, codes.numel(),
            BLOCK_SIZE=block_size, WIDTH=_WIDTH, enable_fp_fusion=False,
        )  # fmt: skip
    return out.to(dtype)
