"""Matmuls with a 4-bit weight on a CUDA device: a dense GEMM for many rows of x, a fused kernel for few.

Many rows (training): de-quantise into the stream's workspace, then cuBLAS. De-quantising moves 2.5 bytes a weight; the
GEMM does 2 x rows operations with it. Under ``workspace.weights_held`` even that is paid once for all tiles.

Few rows (generation): the time is that of reading the weight, 0.52 bytes each if it stays packed. The fused kernel
de-quantises a tile of W in registers, rounds it to the dtype of x, as the dense path does, and multiplies it on the
tensor cores, summing in fp32. Codes come in pairs, even column first: the even and the odd columns of x are multiplied
apart, which spares interleaving them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from longfit.kernels.triton.device import kernel_dtype, on_device
from longfit.kernels.triton.weights_4bit import Weight4Tensors, block_constants
from longfit.kernels.workspace import workspace
from longfit.numerics.row_format import RowFormat

FEW_ROWS = 16  # of x: the smallest side of a tensor-core tile

# Outputs of a program and columns it takes at a time: 32 x 128 bytes of codes, 32 a thread.
_OUTPUTS, _COLUMNS = 32, 256


@triton.jit
def _linear(
    x, y, num_rows, out_features, in_features, x_stride, codes, scales, nested, offset, levels, scale_levels,
    code_stride, scale_stride, blocks_per_row, first_block, BLOCK_SIZE: tl.constexpr, ABSMAX_BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    NUM_BLOCKS: tl.constexpr = COLUMNS // BLOCK_SIZE if COLUMNS > BLOCK_SIZE else 1
    PAIRS: tl.constexpr = COLUMNS // 2
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]  # [OUTPUTS, 1]
    row = tl.arange(0, ROWS)[:, None]  # of x
    y_tile = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, in_features, COLUMNS):
        place = start // BLOCK_SIZE + tl.arange(0, NUM_BLOCKS)[None, :]
        block = first_block + output * blocks_per_row + place
        absmax = block_constants(
            scales + output * scale_stride, nested, offset, scale_levels, place, block,
            (output < out_features) & (place < blocks_per_row), ABSMAX_BLOCK_SIZE, DOUBLE_QUANT,
        )  # fmt: skip
        absmax = tl.reshape(absmax, (OUTPUTS, NUM_BLOCKS, 1))
        pair = start // 2 + tl.arange(0, PAIRS)[None, :]
        inside = (output < out_features) & (2 * pair < in_features)
        byte = tl.load(codes + output * code_stride + pair, mask=inside, other=0).to(tl.int32)
        even = tl.reshape(tl.load(levels + (byte >> 4)), (OUTPUTS, NUM_BLOCKS, PAIRS // NUM_BLOCKS)) * absmax
        odd = tl.reshape(tl.load(levels + (byte & 15)), (OUTPUTS, NUM_BLOCKS, PAIRS // NUM_BLOCKS)) * absmax
        even = tl.reshape(even, (OUTPUTS, PAIRS)).to(x.dtype.element_ty)
        odd = tl.reshape(odd, (OUTPUTS, PAIRS)).to(x.dtype.element_ty)
        x_place = x + row * x_stride + 2 * pair
        x_inside = (row < num_rows) & (2 * pair < in_features)
        x_even = tl.load(x_place, mask=x_inside, other=0.0)
        x_odd = tl.load(x_place + 1, mask=x_inside, other=0.0)
        y_tile = tl.dot(x_even, tl.trans(even), y_tile, input_precision="ieee")
        y_tile = tl.dot(x_odd, tl.trans(odd), y_tile, input_precision="ieee")
    y_place = y + row * out_features + tl.trans(output)
    tl.store(y_place, y_tile.to(y.dtype.element_ty), mask=(row < num_rows) & (tl.trans(output) < out_features))


def linear_4bit(x: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat) -> Tensor:
    """Compute ``x dq(W)^T``; see `longfit.kernels.dispatch.linear_4bit`."""
    x2 = x.reshape(-1, fmt.in_features)  # [M, I]
    whole_blocks_in_rows = fmt.in_features % fmt.block_size == 0
    if x2.shape[0] > FEW_ROWS or not whole_blocks_in_rows or kernel_dtype(x.dtype, x.device) != x.dtype:
        return F.linear(x, _dense(rows, constants, fmt, x.dtype))
    return _few_rows(x2.contiguous(), Weight4Tensors.of_rows(rows, constants, fmt), fmt).view(
        *x.shape[:-1], fmt.out_features
    )


def _few_rows(x2: Tensor, weight: Weight4Tensors, fmt: RowFormat) -> Tensor:
    y = torch.empty(x2.shape[0], fmt.out_features, dtype=x2.dtype, device=x2.device)
    *tensors_and_strides, block_size, absmax_block_size, double_quant = weight
    with on_device(x2):
        _linear[(triton.cdiv(fmt.out_features, _OUTPUTS),)](
            x2, y, x2.shape[0], fmt.out_features, fmt.in_features, x2.stride(0), *tensors_and_strides,
            BLOCK_SIZE=block_size, ABSMAX_BLOCK_SIZE=absmax_block_size, DOUBLE_QUANT=double_quant,
            ROWS=FEW_ROWS, OUTPUTS=_OUTPUTS, COLUMNS=_COLUMNS, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def linear_4bit_grad_input(grad: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat) -> Tensor:
    """Compute ``grad dq(W)``; see `longfit.kernels.dispatch.linear_4bit_grad_input`."""
    return grad @ _dense(rows, constants, fmt, grad.dtype)


def _dense(rows: Tensor, constants: Tensor, fmt: RowFormat, dtype: torch.dtype) -> Tensor:
    """Return the weight ``[out, in]`` in a dtype; valid until the stream's next matmul with a 4-bit weight."""
    weight, written = Weight4Tensors.of_rows(rows, constants, fmt), kernel_dtype(dtype, rows.device)
    shape = (fmt.out_features, fmt.in_features)
    return workspace(rows.device).dense(rows, shape, written, weight.dequantize).to(dtype)
