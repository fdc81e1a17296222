"""4-bit and 8-bit weights in C++: passes pointers to the kernels of ``library.py``.

The functions have the bits of `numerics`, which states every rule. What they add: no temporaries, all cores that torch
uses (``torch.get_num_threads()``), and matmuls that never hold a 16-bit copy of the whole weight.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from longfit.kernels.cpu import processor
from longfit.kernels.cpu.library import DTYPES, Weight4Struct, library, unavailable, why
from longfit.kernels.dense_weight_bytes import TILE_BYTES
from longfit.numerics import codebooks
from longfit.numerics.absmax import num_blocks
from longfit.numerics.double_quant import DoubleQuant
from longfit.numerics.quant_state import QuantState
from longfit.numerics.row_format import RowFormat

__all__ = [
    "dequantize_4bit",
    "dequantize_8bit",
    "dequantize_rows",
    "linear_4bit",
    "linear_4bit_grad_input",
    "quantize_4bit",
    "quantize_8bit",
    "unavailable",
    "why",
]

# In float32 on AVX2, one thread, torch's GEMM with a de-quantised tile in the cache reaches 0.98 of the dense product
# at 2,048 rows (576 x 1536) and 0.90 at 1,024 rows of 4096 x 4096: no packing of our own is called for.
# Up to this many rows of x, dot products of x and rows of W take less time than a GEMM; and than our own GEMM in bf16.
FEW_ROWS = 16
FEW_ROWS_BF16 = 1

NEAREST_BYTES = 44 << 10  # LONGFIT_NEAREST_BYTES of csrc/longfit.h

# Made once, with the module: pointers to them are kept, also by threads that use a format for the first time together.
_CODEBOOKS = {quant_type: codebooks.codebook(quant_type) for quant_type in codebooks.QUANT_TYPES}
_SCALE_MAP = codebooks.dynamic_map(signed=True)


def quantize_4bit(
    weight: Tensor, *, quant_type: str, block_size: int, double_quant: bool, absmax_block_size: int
) -> tuple[Tensor, QuantState]:
    """See `longfit.numerics.quant_state.quantize_4bit`."""
    values = _values(weight)
    packed = torch.empty((values.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(num_blocks(values.numel(), block_size), dtype=torch.float32)
    library().kernel("quantize_4bit")(
        values.data_ptr(),
        values.numel(),
        DTYPES[values.dtype],
        _CODEBOOKS[quant_type].data_ptr(),
        block_size,
        packed.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    stored = _quantize_absmax(absmax, absmax_block_size) if double_quant else absmax
    return packed, QuantState(quant_type, block_size, tuple(weight.shape), weight.dtype, stored)


def _quantize_absmax(absmax: Tensor, absmax_block_size: int) -> DoubleQuant:
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())  # torch's reduction: the rule says so
    table = _nearest_scales(library().isa)
    codes, nested = _quantize_8bit(absmax - offset, table, block_size=absmax_block_size)
    return DoubleQuant(codes, nested, offset, absmax_block_size)


def dequantize_4bit(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """See `longfit.numerics.quant_state.dequantize_4bit`."""
    weight, _held = _flat_weight(packed, state)
    out = library().empty(state.shape, _stored(dtype))
    numel = out.numel()
    _dequantize(weight, (0, 1), (0, numel), out, numel)
    return _as(out, dtype)


def _flat_weight(packed: Tensor, state: QuantState) -> tuple[Weight4Struct, list[Tensor]]:
    """Describe a weight in the flat format; the tensors returned with it must outlive the description."""
    absmax, held = state.absmax, [packed.contiguous()]
    if isinstance(absmax, DoubleQuant):
        held += [absmax.codes.contiguous(), absmax.absmax.contiguous()]
        template = _flat_template(state.quant_type, state.block_size, absmax.absmax_block_size)
        weight = Weight4Struct.from_buffer_copy(template)
        weight.nested, weight.offset = held[2].data_ptr(), absmax.offset.data_ptr()
    else:
        held.append(absmax.contiguous())
        weight = Weight4Struct.from_buffer_copy(_flat_template(state.quant_type, state.block_size))
    weight.codes, weight.scales = held[0].data_ptr(), held[1].data_ptr()
    return weight, held


@cache
def _flat_template(quant_type: str, block_size: int, absmax_block_size: int = 0) -> Weight4Struct:
    """Return what all weights of a format share; making it takes as long as filling in the rest."""
    scale_map = _SCALE_MAP.data_ptr() if absmax_block_size else None
    return Weight4Struct(
        codebook=_CODEBOOKS[quant_type].data_ptr(),
        block_size=block_size,
        scale_map=scale_map,
        absmax_block_size=absmax_block_size,
    )


def quantize_8bit(values: Tensor, codebook: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """See `longfit.numerics.blockwise.quantize_blockwise`."""
    return _quantize_8bit(_values(values), _nearest_table(codebook.contiguous()), block_size=block_size)


def _quantize_8bit(values: Tensor, table: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty(values.numel(), dtype=torch.uint8)
    absmax = torch.empty(num_blocks(values.numel(), block_size), dtype=torch.float32)
    library().kernel("quantize_8bit")(
        values.data_ptr(),
        values.numel(),
        DTYPES[values.dtype],
        table.data_ptr(),
        block_size,
        codes.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, absmax


def _nearest_table(codebook: Tensor) -> Tensor:
    """Return what finding the nearest of these levels needs to know, in the form of the instruction set in use."""
    table = torch.empty(NEAREST_BYTES, dtype=torch.uint8)
    library().kernel("nearest_table")(codebook.data_ptr(), codebook.numel(), table.data_ptr())
    return table


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, *, block_size: int, dtype: torch.dtype) -> Tensor:
    """See `longfit.numerics.blockwise.dequantize_blockwise`."""
    codes, absmax, codebook = codes.contiguous(), absmax.contiguous(), codebook.contiguous()
    out = library().empty((codes.numel(),), _stored(dtype))
    library().kernel("dequantize_8bit")(
        codes.data_ptr(),
        absmax.data_ptr(),
        codes.numel(),
        codebook.data_ptr(),
        block_size,
        out.data_ptr(),
        DTYPES[out.dtype],
        torch.get_num_threads(),
    )
    return _as(out, dtype)


def dequantize_rows(rows: Tensor, constants: Tensor, fmt: RowFormat, dtype: torch.dtype, *, first_row: int) -> Tensor:
    """See `longfit.numerics.row_format.dequantize_rows`."""
    rows, constants = _dense_rows(rows), constants.contiguous()
    weight = _row_weight(rows, constants, fmt, first_row=first_row)
    num_rows = fmt.out_features if weight.element_stride and rows.shape[0] else rows.shape[0]
    out = library().empty((num_rows, fmt.in_features), _stored(dtype))
    _dequantize(weight, (0, num_rows), (0, fmt.in_features), out, fmt.in_features)
    return _as(out, dtype)


def linear_4bit(x: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat) -> Tensor:
    """Compute ``x dq(W)^T``; see `longfit.kernels.dispatch.linear_4bit`."""
    x2 = x if x.dim() == 2 else x.reshape(-1, fmt.in_features)  # [M, I]; a view takes 1 us
    y = torch.empty(*x.shape[:-1], fmt.out_features, dtype=x.dtype)
    rows, constants = _dense_rows(rows), constants.contiguous()
    weight = _row_weight(rows, constants, fmt)
    own_gemm = x.dtype == torch.bfloat16 and library().multiplies_4bit
    if x2.shape[0] <= (FEW_ROWS_BF16 if own_gemm else FEW_ROWS) and x.dtype in DTYPES:
        x2 = x2.contiguous()
        library().kernel("linear_4bit")(
            weight,
            fmt.out_features,
            fmt.in_features,
            x2.data_ptr(),
            x2.shape[0],
            y.data_ptr(),
            DTYPES[x.dtype],
            torch.get_num_threads(),
        )
    elif own_gemm:
        _multiply(x2, weight, y, transposed=True)
    else:
        _linear_by_tiles(x2, weight, fmt, y.view(-1, fmt.out_features))
    return y


def linear_4bit_grad_input(grad: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat) -> Tensor:
    """Compute ``grad dq(W)``; see `longfit.kernels.dispatch.linear_4bit_grad_input`."""
    grad2 = grad.reshape(-1, fmt.out_features)  # [M, O]
    out = torch.empty(*grad.shape[:-1], fmt.in_features, dtype=grad.dtype)
    rows, constants = _dense_rows(rows), constants.contiguous()
    weight = _row_weight(rows, constants, fmt)
    if grad.dtype == torch.bfloat16 and library().multiplies_4bit:
        _multiply(grad2, weight, out, transposed=False)
    else:
        _grad_input_by_tiles(grad2, weight, fmt, out.view(-1, fmt.in_features))
    return out


def _multiply(a: Tensor, weight: Weight4Struct, out: Tensor, *, transposed: bool) -> None:
    """Fill ``out`` [..., N] with ``a`` [M, K] times W or W^T, de-quantising where a GEMM copies its operands anyhow."""
    depth = a.shape[1]
    if depth % 2:
        a = F.pad(a, (0, 1))  # the kernel reads pairs
    elif a.stride(1) != 1:
        a = a.contiguous()
    library().kernel("matmul_4bit")(
        weight,
        transposed,
        a.shape[0],
        out.shape[-1],
        depth,
        a.data_ptr(),
        a.stride(0),
        out.data_ptr(),
        torch.get_num_threads(),
    )


def _linear_by_tiles(x2: Tensor, weight: Weight4Struct, fmt: RowFormat, y: Tensor) -> None:
    """Fill ``y`` [M, O] by running torch's GEMM of ``x2`` [M, I] with a de-quantised tile of rows of W at a time."""
    height = _tile(fmt.out_features, fmt.in_features, y.dtype)
    tile = library().tile(height, fmt.in_features, dtype=_stored(y.dtype))
    x2 = _operand(x2, y.dtype)
    for row in range(0, fmt.out_features, height):
        part = tile[: min(height, fmt.out_features - row)]
        _dequantize(weight, (row, part.shape[0]), (0, fmt.in_features), part, fmt.in_features)
        _product(x2, part.to(x2.dtype).t(), y[:, row : row + part.shape[0]])


def _grad_input_by_tiles(grad2: Tensor, weight: Weight4Struct, fmt: RowFormat, out: Tensor) -> None:
    """Fill ``out`` [M, I], tile by tile over the columns of W, so that nothing is summed in 16 bits."""
    width = _tile(fmt.in_features, fmt.out_features, out.dtype)
    tile = library().tile(fmt.out_features, width, dtype=_stored(out.dtype))
    grad2 = _operand(grad2, out.dtype)
    for column in range(0, fmt.in_features, width):
        part = tile[:, : min(width, fmt.in_features - column)]
        _dequantize(weight, (0, fmt.out_features), (column, part.shape[1]), part, width)
        _product(grad2, part.to(grad2.dtype), out[:, column : column + part.shape[1]])


def _multiplied(dtype: torch.dtype) -> torch.dtype:
    """Return what torch multiplies fast: 16-bit numbers in float32 where the processor would emulate them."""
    emulated = dtype in (torch.bfloat16, torch.float16) and processor.bf16_instructions() is None
    return torch.float32 if emulated else dtype


def _operand(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``a`` [M, K] as torch multiplies it fast and reads nothing else.

    oneDNN 3.12 multiplies bf16 on AMX 32 numbers along K at a time, and what it reads between strided rows by zeros:
    a NaN there spoils the product.
    """
    a = a.to(_multiplied(dtype))
    return a.contiguous() if a.shape[1] % 32 else a


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Fill ``out`` with ``a b``, rounded to its dtype if that is another."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _tile(length: int, depth: int, dtype: torch.dtype) -> int:
    """Return how many of the ``length`` rows (or columns) of W, ``depth`` weights each, a tile holds.

    Tiles of equal size and, where W allows it, a multiple of 64, so that no GEMM is a sliver and no tile cuts a block.
    """
    most = max(8, TILE_BYTES // (depth * dtype.itemsize))
    step = 64 if most >= 64 else 8
    tiles = -(-length // (most // step * step))
    return min(length, -(-length // tiles // step) * step)


def _dequantize(
    weight: Weight4Struct, rows: tuple[int, int], columns: tuple[int, int], out: Tensor, out_stride: int
) -> None:
    """De-quantise a window, given as (first, count) of rows and of columns, to ``out``; its rows are strided."""
    library().kernel("dequantize_4bit")(
        weight, *rows, *columns, out.data_ptr(), out_stride, DTYPES[out.dtype], torch.get_num_threads()
    )


def _row_weight(rows: Tensor, constants: Tensor, fmt: RowFormat, *, first_row: int = 0) -> Weight4Struct:
    """Describe a weight in the row format; the tensors must outlive the description."""
    weight, code_bytes, blocks_per_row = _row_template(fmt)
    weight = Weight4Struct.from_buffer_copy(weight)
    weight.codes = codes = rows.data_ptr()
    weight.scales = codes + code_bytes
    if blocks_per_row:
        weight.code_stride = weight.scale_stride = rows.stride(0)
        weight.first_block = first_row * blocks_per_row
    if fmt.double_quant:
        weight.nested = nested = constants.data_ptr()
        weight.offset = nested + constants.numel() - 4
    return weight


@cache
def _row_template(fmt: RowFormat) -> tuple[Weight4Struct, int, int]:
    """Return what all weights of a format share, its code bytes, and its blocks per row (0: all blocks in one row)."""
    weight = Weight4Struct(
        codebook=_CODEBOOKS[fmt.quant_type].data_ptr(),
        block_size=fmt.block_size,
        absmax_block_size=fmt.absmax_block_size,
    )
    if fmt.double_quant:
        weight.scale_map = _SCALE_MAP.data_ptr()
    if fmt.rows == 1:  # blocks may run across the rows of the weight
        weight.element_stride = fmt.in_features
        return weight, fmt.code_bytes, 0
    weight.block_stride = fmt.blocks_per_row
    return weight, fmt.code_bytes, fmt.blocks_per_row


def _dense_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _values(values: Tensor) -> Tensor:
    """Return the values as one run in a dtype that the kernels read; fp64 is rounded to fp32, as the rule says."""
    flat = values.detach().reshape(-1)
    return (flat.float() if flat.dtype == torch.float64 else flat).contiguous()


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a kernel writes: fp64 is exact from fp32, in which the product is computed."""
    return torch.float32 if dtype == torch.float64 else dtype


def _as(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a result in the dtype that was asked for; the call alone would take a microsecond."""
    return out if out.dtype == dtype else out.to(dtype)


@cache
def _nearest_scales(isa: str) -> Tensor:
    """Return the table of the codebook of block constants; making it takes longer than using it on a small weight."""
    return _nearest_table(_SCALE_MAP)
