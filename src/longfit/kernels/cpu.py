"""The C++ kernels: finds the library, chooses the instruction set, passes pointers (ctypes; no torch headers in C++).

``_longfit.so`` lies beside this file; the package's build makes it from ``csrc/``. It holds each kernel once per
instruction set ("ISA"), named ``longfit_<kernel>_<isa>``; the fastest that the processor runs is used. Two environment
variables are for tests and bug reports: ``LONGFIT_ISA`` forces an instruction set, ``LONGFIT_LIBRARY`` names another
library file.

The functions have the bits of `numerics`, which states every rule. What they add: no temporaries, all cores that torch
uses (``torch.get_num_threads()``), and matmuls that never hold a 16-bit copy of the whole weight.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longfit.errors import BackendError
from longfit.kernels.sizes import TILE_BYTES
from longfit.numerics import codebooks
from longfit.numerics.absmax import num_blocks
from longfit.numerics.double_quant import DoubleQuant
from longfit.numerics.quant_state import QuantState
from longfit.numerics.row_format import RowFormat

ABI = 4  # LONGFIT_ABI of csrc/longfit.h

# Up to this many rows of x, dot products of x and rows of W take less time than a GEMM; and than our own GEMM in bf16.
FEW_ROWS = 16
FEW_ROWS_BF16 = 1

NEAREST_BYTES = 44 << 10  # LONGFIT_NEAREST_BYTES of csrc/longfit.h

# Results from this size on are new memory from the system, not from the allocator's cache.
HUGE_BYTES = 4 << 20

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Weight4(ctypes.Structure):
    """``longfit_weight4`` of csrc/longfit.h, which explains the fields."""

    _fields_ = [
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("codebook", c_void_p),
        ("scale_map", c_void_p),
        ("nested", c_void_p),
        ("offset", c_void_p),
        ("element_stride", c_int64),
        ("code_stride", c_int64),
        ("scale_stride", c_int64),
        ("block_stride", c_int64),
        ("first_block", c_int64),
        ("block_size", c_int64),
        ("absmax_block_size", c_int64),
    ]


_SIGNATURES: dict[str, list[Any]] = {
    "dequantize_4bit": [
        ctypes.POINTER(Weight4), c_int64, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int, c_int,
    ],
    "linear_4bit": [ctypes.POINTER(Weight4), c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int, c_int],
    "matmul_4bit": [
        ctypes.POINTER(Weight4), c_int, c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int,
    ],
    "quantize_4bit": [c_void_p, c_int64, c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int],
    "nearest_table": [c_void_p, c_int, c_void_p],
    "quantize_8bit": [c_void_p, c_int64, c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int],
    "dequantize_8bit": [c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int, c_int],
    "adamw": [c_void_p, c_int64, c_int],
    "adamw_maps": [c_void_p, c_void_p, c_void_p, c_void_p],
    "attention_forward": [c_void_p] * 6,
    "attention_backward": [c_void_p] * 10,
    "rms_norm_forward": [c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p, c_void_p, c_int],
    "rms_norm_backward": [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int],
    "swiglu_forward": [c_void_p, c_void_p, c_int64, c_void_p, c_int],
    "cross_entropy": [c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p, c_int],
    "swiglu_backward": [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int],
}  # fmt: skip


class Library:
    """The loaded library and the instruction set in use.

    Attributes:
        path: the file.
        isas: what this processor can run of what the file holds, fastest first.
        isa: the one in use; assign to force another.
    """

    def __init__(self, path: Path, isa: str | None = None) -> None:
        if not path.exists():
            raise BackendError(
                f"the C++ library {path.name} is missing in {path.parent}: longfit was installed without a working "
                "compiler; install GCC or Clang and install longfit again"
            )
        try:
            self._handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(f"the C++ library does not load ({error}); install longfit again") from error
        abi = self._handle.longfit_abi()
        if abi != ABI:
            raise BackendError(f"the C++ library {path} has version {abi}, this longfit needs {ABI}; install it again")
        self._handle.longfit_isas.restype = ctypes.c_char_p
        self.path = path
        self._has_amx = bool(self._handle.longfit_has_amx())
        self.isas = tuple(self._handle.longfit_isas().decode().split(","))
        self._kernels: dict[tuple[str, str], Any] = {}
        self._tiles = threading.local()
        self._isa = self.isas[0]
        if isa is not None:
            self.isa = isa

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._isa

    @isa.setter
    def isa(self, isa: str) -> None:
        if isa not in self.isas:
            raise BackendError(f"LONGFIT_ISA: got {isa!r}; this processor and library have {', '.join(self.isas)}")
        self._isa = isa

    @property
    def multiplies_bf16(self) -> bool:
        """Whether the library's own bf16 GEMM is the fastest there is."""
        return self._isa == "avx512_bf16" and not self._has_amx

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return uninitialised memory for a result, on huge pages where it is large."""
        result = torch.empty(shape, dtype=dtype)
        if result.nbytes >= HUGE_BYTES:
            self._handle.longfit_advise_huge_pages(c_void_p(result.data_ptr()), c_int64(result.nbytes))
        return result

    def tile(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return this thread's scratch memory for a tile of W: kept, as fresh pages would cost more than filling it."""
        num_bytes = math.prod(shape) * dtype.itemsize
        kept: Tensor | None = getattr(self._tiles, "bytes", None)
        if kept is None or kept.numel() < num_bytes:
            kept = self._tiles.bytes = torch.empty(max(num_bytes, TILE_BYTES), dtype=torch.uint8)
        return kept[:num_bytes].view(dtype).view(shape)

    def kernel(self, name: str) -> Any:
        """Return a kernel for the instruction set in use."""
        key = (name, self._isa)
        if key not in self._kernels:
            function = getattr(self._handle, f"longfit_{name}_{self._isa}")
            function.argtypes, function.restype = _SIGNATURES[name], None
            self._kernels[key] = function
        return self._kernels[key]


@cache
def library() -> Library:
    """Load the library.

    Raises: BackendError: it is missing, broken or of another version, or ``LONGFIT_ISA`` cannot be run here.
    """
    beside = Path(__file__).with_name("_longfit.so")
    return Library(Path(os.environ.get("LONGFIT_LIBRARY", beside)), os.environ.get("LONGFIT_ISA"))


def unavailable() -> str | None:
    """Return why the library cannot be used, or None.

    Raises: BackendError: ``LONGFIT_ISA`` or ``LONGFIT_LIBRARY`` asks for something that is not there.
    """
    try:
        library()
    except BackendError as error:
        if "LONGFIT_ISA" in os.environ or "LONGFIT_LIBRARY" in os.environ:
            raise
        return str(error)
    return None


def why() -> str:
    """Return what is in use, for the report of `longfit.kernels.dispatch.backends`."""
    return f"C++ kernels for {library().isa}"


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
        _DTYPES[values.dtype],
        _codebook(quant_type).data_ptr(),
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
    out = library().empty(*state.shape, dtype=_stored(dtype))
    _dequantize(weight, (0, 1), (0, state.numel), out, state.numel)
    return out.to(dtype)


def _flat_weight(packed: Tensor, state: QuantState) -> tuple[Weight4, list[Tensor]]:
    """Describe a weight in the flat format; the tensors returned with it must outlive the description."""
    absmax, held = state.absmax, [packed.contiguous()]
    weight = Weight4(
        codes=held[0].data_ptr(), codebook=_codebook(state.quant_type).data_ptr(), block_size=state.block_size
    )
    if isinstance(absmax, DoubleQuant):
        held += [absmax.codes.contiguous(), absmax.absmax.contiguous()]
        weight.scale_map, weight.nested = _scale_map(absmax.storage).data_ptr(), held[2].data_ptr()
        weight.offset, weight.absmax_block_size = absmax.offset.data_ptr(), absmax.absmax_block_size
    else:
        held.append(absmax.contiguous())
    weight.scales = held[1].data_ptr()
    return weight, held


def quantize_8bit(values: Tensor, codebook: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """See `longfit.numerics.blockwise.quantize_blockwise`."""
    return _quantize_8bit(_values(values), _nearest_table(codebook.contiguous()), block_size=block_size)


def _quantize_8bit(values: Tensor, table: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty(values.numel(), dtype=torch.uint8)
    absmax = torch.empty(num_blocks(values.numel(), block_size), dtype=torch.float32)
    library().kernel("quantize_8bit")(
        values.data_ptr(),
        values.numel(),
        _DTYPES[values.dtype],
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
    out = library().empty(codes.numel(), dtype=_stored(dtype))
    library().kernel("dequantize_8bit")(
        codes.data_ptr(),
        absmax.data_ptr(),
        codes.numel(),
        codebook.data_ptr(),
        block_size,
        out.data_ptr(),
        _DTYPES[out.dtype],
        torch.get_num_threads(),
    )
    return out.to(dtype)


def dequantize_rows(rows: Tensor, constants: Tensor, fmt: RowFormat, dtype: torch.dtype, *, first_row: int) -> Tensor:
    """See `longfit.numerics.row_format.dequantize_rows`."""
    rows, constants = _dense_rows(rows), constants.contiguous()
    weight = _row_weight(rows, constants, fmt, first_row=first_row)
    num_rows = fmt.out_features if weight.element_stride and rows.shape[0] else rows.shape[0]
    out = library().empty(num_rows, fmt.in_features, dtype=_stored(dtype))
    _dequantize(weight, (0, num_rows), (0, fmt.in_features), out, fmt.in_features)
    return out.to(dtype)


def linear_4bit(x: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat) -> Tensor:
    """Compute ``x dq(W)^T``; see `longfit.kernels.dispatch.linear_4bit`."""
    x2 = x.reshape(-1, fmt.in_features)  # [M, I]
    y = torch.empty(*x.shape[:-1], fmt.out_features, dtype=x.dtype)
    rows, constants = _dense_rows(rows), constants.contiguous()
    weight = _row_weight(rows, constants, fmt)
    own_gemm = x.dtype == torch.bfloat16 and library().multiplies_bf16
    if x2.shape[0] <= (FEW_ROWS_BF16 if own_gemm else FEW_ROWS) and x.dtype in _DTYPES:
        x2 = x2.contiguous()
        library().kernel("linear_4bit")(
            weight,
            fmt.out_features,
            fmt.in_features,
            x2.data_ptr(),
            x2.shape[0],
            y.data_ptr(),
            _DTYPES[x.dtype],
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
    if grad.dtype == torch.bfloat16 and library().multiplies_bf16:
        _multiply(grad2, weight, out, transposed=False)
    else:
        _grad_input_by_tiles(grad2, weight, fmt, out.view(-1, fmt.in_features))
    return out


def _multiply(a: Tensor, weight: Weight4, out: Tensor, *, transposed: bool) -> None:
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


def _linear_by_tiles(x2: Tensor, weight: Weight4, fmt: RowFormat, y: Tensor) -> None:
    """Fill ``y`` [M, O] by running torch's GEMM of ``x2`` [M, I] with a de-quantised tile of rows of W at a time."""
    height = _tile(fmt.out_features, fmt.in_features, y.dtype)
    tile = library().tile(height, fmt.in_features, dtype=_stored(y.dtype))
    for row in range(0, fmt.out_features, height):
        part = tile[: min(height, fmt.out_features - row)]
        _dequantize(weight, (row, part.shape[0]), (0, fmt.in_features), part, fmt.in_features)
        torch.mm(x2, part.to(y.dtype).t(), out=y[:, row : row + part.shape[0]])


def _grad_input_by_tiles(grad2: Tensor, weight: Weight4, fmt: RowFormat, out: Tensor) -> None:
    """Fill ``out`` [M, I], tile by tile over the columns of W, so that nothing is summed in 16 bits."""
    width = _tile(fmt.in_features, fmt.out_features, out.dtype)
    tile = library().tile(fmt.out_features, width, dtype=_stored(out.dtype))
    for column in range(0, fmt.in_features, width):
        part = tile[:, : min(width, fmt.in_features - column)]
        _dequantize(weight, (0, fmt.out_features), (column, part.shape[1]), part, width)
        torch.mm(grad2, part.to(out.dtype), out=out[:, column : column + part.shape[1]])


def _tile(length: int, depth: int, dtype: torch.dtype) -> int:
    """Return how many of the ``length`` rows (or columns) of W, ``depth`` weights each, a tile holds.

    Tiles of equal size and, where W allows it, a multiple of 64, so that no GEMM is a sliver and no tile cuts a block.
    """
    most = max(8, TILE_BYTES // (depth * dtype.itemsize))
    step = 64 if most >= 64 else 8
    tiles = -(-length // (most // step * step))
    return min(length, -(-length // tiles // step) * step)


def _dequantize(weight: Weight4, rows: tuple[int, int], columns: tuple[int, int], out: Tensor, out_stride: int) -> None:
    """De-quantise a window, given as (first, count) of rows and of columns, to ``out``; its rows are strided."""
    library().kernel("dequantize_4bit")(
        weight, *rows, *columns, out.data_ptr(), out_stride, _DTYPES[out.dtype], torch.get_num_threads()
    )


def _row_weight(rows: Tensor, constants: Tensor, fmt: RowFormat, *, first_row: int = 0) -> Weight4:
    """Describe a weight in the row format; the tensors must outlive the description."""
    weight, code_bytes, blocks_per_row = _row_template(fmt)
    weight = Weight4.from_buffer_copy(weight)
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
def _row_template(fmt: RowFormat) -> tuple[Weight4, int, int]:
    """Return what all weights of a format share, its code bytes, and its blocks per row (0: all blocks in one row)."""
    weight = Weight4(
        codebook=_codebook(fmt.quant_type).data_ptr(),
        block_size=fmt.block_size,
        absmax_block_size=fmt.absmax_block_size,
    )
    if fmt.double_quant:
        weight.scale_map = _scale_map("dynamic8").data_ptr()
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


@cache
def _codebook(quant_type: str) -> Tensor:
    return codebooks.codebook(quant_type)


@cache
def _scale_map(storage: str) -> Tensor:
    return codebooks.dynamic_map(signed=True) if storage == "dynamic8" else codebooks.fp8_e4m3_map()


@cache
def _nearest_scales(isa: str) -> Tensor:
    """Return the table of the codebook of block constants; making it takes longer than using it on a small weight."""
    return _nearest_table(_scale_map("dynamic8"))
