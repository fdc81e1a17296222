"""4-bit weights on a CUDA device: quantise and de-quantise, bit by bit as ``numerics/quant_state.py`` does it.

    quantize       a program takes some whole blocks: absmax in registers, four compares a weight, two codes a byte
    dequantize     one launch from bytes to weights. The block constants of double quantisation are decoded where they
                   are used, two roundings each, so that fp32 constants never exist in memory

One kernel de-quantises the flat format and the row format alike: a block is found by its row and its place in the row,
and the flat format is a single row whose constants lie elsewhere. Block numbers and addresses are 64 bits wide.

All launches go to the current stream and none waits for the device. Tables are kept on the device after their first
use, so a CUDA graph can capture a second call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longfit.kernels.triton.blocks import (
    largest_magnitude,
    levels_of,
    load_float,
    nearest_rank,
    scale_to_one,
    tables_of,
)
from longfit.kernels.triton.blockwise_8bit import quantize_by_tables
from longfit.kernels.triton.device import kernel_dtype, on_device
from longfit.numerics.absmax import num_blocks
from longfit.numerics.double_quant import DoubleQuant
from longfit.numerics.quant_state import QuantState
from longfit.numerics.row_format import RowFormat

# Weights a program of 128 threads handles. A thread then loads 8 bytes of codes at a time and stores 16 bytes of bf16;
# with 4,096 weights the exchange between threads before the store would need seven barriers instead of one.
_WEIGHTS = 2048


# ------------------------------------------------------------------------------------------------ quantise
@triton.jit
def _quantize(
    values, packed, absmax, thresholds, code_of_rank, numel, num_pairs, BLOCK_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0).to(tl.int64) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS)
    index = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]  # [NUM_BLOCKS, BLOCK_SIZE]
    inside = index < numel
    here = tl.load(values + index, mask=inside, other=0.0).to(tl.float32)
    largest, broken = largest_magnitude(here)
    largest = tl.where(broken != 0, float("nan"), largest)
    tl.store(absmax + block, largest, mask=block * BLOCK_SIZE < numel)
    scaled = scale_to_one(here, largest[:, None])
    scaled = tl.where(inside, scaled, 0.0)  # an odd last code is completed with that of 0, even in a broken block
    code = tl.load(code_of_rank + nearest_rank(scaled, thresholds, 4))
    high, low = tl.split(tl.reshape(code, (NUM_BLOCKS, HALF, 2)))
    place = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed + place, (high << 4) | low, mask=place < num_pairs)


def quantize_4bit(
    weight: Tensor, *, quant_type: str, block_size: int, double_quant: bool, absmax_block_size: int
) -> tuple[Tensor, QuantState]:
    """See `longfit.numerics.quant_state.quantize_4bit`."""
    flat = weight.detach().reshape(-1)
    flat = flat.to(kernel_dtype(flat.dtype, flat.device)).contiguous()
    blocks, per_program = num_blocks(flat.numel(), block_size), max(1, _WEIGHTS // block_size)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    thresholds, code_of_rank, _ = tables_of(quant_type, flat.device)
    with on_device(flat):
        _quantize[(triton.cdiv(blocks, per_program),)](
            flat, packed, absmax, thresholds, code_of_rank, flat.numel(), packed.numel(),
            BLOCK_SIZE=block_size, NUM_BLOCKS=per_program, enable_fp_fusion=False,
        )  # fmt: skip
    stored = _quantize_absmax(absmax, absmax_block_size) if double_quant else absmax
    return packed, QuantState(quant_type, block_size, tuple(weight.shape), weight.dtype, stored)


def _quantize_absmax(absmax: Tensor, absmax_block_size: int) -> DoubleQuant:
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())  # torch's reduction: the rule says so
    tables = tables_of("dynamic8", absmax.device)
    codes, nested = quantize_by_tables(absmax - offset, tables, block_size=absmax_block_size)
    return DoubleQuant(codes, nested, offset, absmax_block_size)


# ------------------------------------------------------------------------------------------------ de-quantise
class Weight4Tensors(NamedTuple):
    """A 4-bit weight as a kernel finds it: where bytes begin, how far apart rows are, the tables, the sizes.

    Attributes:
        codes, scales: uint8, the first row's code bytes and block constants.
        nested, offset: uint8, the fp32 bytes of the constants that all rows share; unused without double quantisation.
        levels, scale_levels: fp32 ``[16]`` and ``[256]``.
        code_stride, scale_stride: bytes from row to row.
        blocks_per_row: blocks in a row, of ``block_size`` weights; the last of them may be short if there is one row.
        first_block: number of the first block in the whole weight, which tells its nested constant.
    """

    codes: Tensor
    scales: Tensor
    nested: Tensor
    offset: Tensor
    levels: Tensor
    scale_levels: Tensor
    code_stride: int
    scale_stride: int
    blocks_per_row: int
    first_block: int
    block_size: int
    absmax_block_size: int
    double_quant: bool

    @classmethod
    def of_flat(cls, packed: Tensor, state: QuantState) -> Weight4Tensors:
        """Describe a weight in the flat format."""
        packed, absmax, device = packed.contiguous(), state.absmax, packed.device
        if isinstance(absmax, DoubleQuant):
            scales, absmax_block_size = absmax.codes.contiguous(), absmax.absmax_block_size
            nested, offset = _bytes_of(absmax.absmax), _bytes_of(absmax.offset)
        else:
            scales, absmax_block_size = _bytes_of(absmax), 1
            nested = offset = scales
        blocks = max(1, num_blocks(state.numel, state.block_size))
        return cls(
            packed, scales, nested, offset, levels_of(state.quant_type, device), levels_of("dynamic8", device), 0, 0,
            blocks, 0, state.block_size, absmax_block_size, state.double_quant,
        )  # fmt: skip

    @classmethod
    def of_rows(cls, rows: Tensor, constants: Tensor, fmt: RowFormat, *, first_row: int = 0) -> Weight4Tensors:
        """Describe rows of a weight in the row format; they may be strided, their bytes may not."""
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        constants, device = constants.contiguous(), rows.device
        scales = rows[:, fmt.code_bytes :]
        nested, offset = (constants, constants[-4:]) if fmt.double_quant else (scales, scales)
        stride = rows.stride(0)
        return cls(
            rows, scales, nested, offset, levels_of(fmt.quant_type, device), levels_of("dynamic8", device), stride,
            stride, fmt.blocks_per_row, first_row * fmt.blocks_per_row, fmt.block_size, fmt.absmax_block_size,
            fmt.double_quant,
        )  # fmt: skip

    def dequantize(self, out: Tensor) -> None:
        """Fill ``out``, contiguous, of a dtype from `kernel_dtype`, with the weights row by row."""
        blocks, per_program = num_blocks(out.numel(), self.block_size), max(1, _WEIGHTS // self.block_size)
        *tensors_and_strides, block_size, absmax_block_size, double_quant = self
        with on_device(out):
            _dequantize[(triton.cdiv(blocks, per_program),)](
                out, out.numel(), (out.numel() + 1) // 2, *tensors_and_strides,
                BLOCK_SIZE=block_size, ABSMAX_BLOCK_SIZE=absmax_block_size, DOUBLE_QUANT=double_quant,
                NUM_BLOCKS=per_program, enable_fp_fusion=False,
            )  # fmt: skip


@triton.jit
def block_constants(
    scales, nested, offset, scale_levels, place, block, inside, ABSMAX_BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):  # fmt: skip
    """Return the fp32 absmax of blocks that lie ``place`` constants behind their address ``scales``."""
    if DOUBLE_QUANT:
        code = tl.load(scales + place, mask=inside, other=0).to(tl.int32)
        centred = tl.load(scale_levels + code) * load_float(nested + block // ABSMAX_BLOCK_SIZE * 4, inside)
        return centred + load_float(offset, True)
    else:
        return load_float(scales + place * 4, inside)


@triton.jit
def _dequantize(
    out, numel, num_pairs, codes, scales, nested, offset, levels, scale_levels, code_stride, scale_stride,
    blocks_per_row, first_block, BLOCK_SIZE: tl.constexpr, ABSMAX_BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0).to(tl.int64) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS)  # of these rows
    row = block // blocks_per_row
    place = block - row * blocks_per_row
    absmax = block_constants(
        scales + row * scale_stride, nested, offset, scale_levels, place, first_block + block,
        block * BLOCK_SIZE < numel, ABSMAX_BLOCK_SIZE, DOUBLE_QUANT,
    )  # fmt: skip
    byte_of_block = row * code_stride + place * HALF
    pair = tl.arange(0, HALF)[None, :]
    # Counted in bytes, not as every second weight, so that the compiler sees runs of 16 and loads them at once.
    inside = block[:, None] * HALF + pair < num_pairs
    byte = tl.load(codes + byte_of_block[:, None] + pair, mask=inside, other=0).to(tl.int32)
    even = tl.load(levels + (byte >> 4)) * absmax[:, None]
    odd = tl.load(levels + (byte & 15)) * absmax[:, None]
    index = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(out + index, tl.interleave(even, odd).to(out.dtype.element_ty), mask=index < numel)


def dequantize_4bit(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """See `longfit.numerics.quant_state.dequantize_4bit`."""
    out = torch.empty(state.shape, dtype=kernel_dtype(dtype, packed.device), device=packed.device)
    Weight4Tensors.of_flat(packed, state).dequantize(out)
    return out.to(dtype)


def dequantize_rows(rows: Tensor, constants: Tensor, fmt: RowFormat, dtype: torch.dtype, *, first_row: int) -> Tensor:
    """See `longfit.numerics.row_format.dequantize_rows`."""
    num_rows = rows.shape[0] * fmt.columns // fmt.in_features
    out = torch.empty(num_rows, fmt.in_features, dtype=kernel_dtype(dtype, rows.device), device=rows.device)
    Weight4Tensors.of_rows(rows, constants, fmt, first_row=first_row).dequantize(out)
    return out.to(dtype)


def _bytes_of(floats: Tensor) -> Tensor:
    return floats.contiguous().view(-1).view(torch.uint8)
