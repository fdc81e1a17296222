"""A 4-bit weight laid out row by row, so that it can be cut along its rows (the output features).

The flat format keeps all codes in one tensor and all block constants in another. Here a row of the weight matrix is one
row of bytes:

    rows       uint8 [out, row_bytes]    the row's code bytes, then its block constants: one byte each with double
                                         quantisation, else four (fp32)
    constants  uint8 [constant_bytes]    fp32 nested absmax values, then the fp32 offset; empty without double quant

Any run of rows de-quantises from its own bytes, the few shared constants, and the number of its first row: block j of
row r is block ``r * (in_features / block_size) + j`` of the weight, which tells its nested absmax. Sharding by rows
needs just that. The conversion to the flat format and back moves bytes and changes none.

When ``in_features`` is not a multiple of ``block_size``, blocks run across rows; then the whole weight is laid out as
one row (``rows == 1``) and cannot be cut. Floats have the machine's byte order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.numerics.absmax import num_blocks
from longfit.numerics.blockwise import dequantize_blockwise, unpack_nibbles
from longfit.numerics.codebooks import codebook, dynamic_map
from longfit.numerics.double_quant import DoubleQuant
from longfit.numerics.quant_state import QuantState, check_format


@dataclass(frozen=True)
class RowFormat:
    """The layout of a 4-bit weight in rows; hashable.

    Attributes:
        out_features, in_features: shape of the weight.
        quant_type, block_size, double_quant, absmax_block_size: as given to `quantize_4bit`.
        dtype: of the weight that was quantised.
    """

    out_features: int
    in_features: int
    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    absmax_block_size: int = 256
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_format(self.quant_type, self.block_size, self.absmax_block_size)
        if self.out_features < 1 or self.in_features < 1:
            raise ValueError(f"shape: got [{self.out_features}, {self.in_features}]; allowed: at least [1, 1]")

    @classmethod
    def of(cls, state: QuantState) -> "RowFormat":
        """Return the layout for a weight in the flat format.

        Raises: ValueError: the weight is not a matrix.
        """
        if len(state.shape) != 2:
            raise ValueError(f"shape: got {list(state.shape)}; rows need a matrix [out, in]; reshape the weight first")
        double = state.absmax if isinstance(state.absmax, DoubleQuant) else None
        absmax_block_size = 256 if double is None else double.absmax_block_size
        rows, columns = state.shape
        return cls(
            rows, columns, state.quant_type, state.block_size, double is not None, absmax_block_size, state.dtype
        )

    @property
    def numel(self) -> int:
        """Weights."""
        return self.out_features * self.in_features

    @property
    def rows(self) -> int:
        """Rows of bytes: ``out_features``, or 1 when blocks run across the rows of the weight."""
        return self.out_features if self.in_features % self.block_size == 0 else 1

    @property
    def columns(self) -> int:
        """Weights in a row of bytes."""
        return self.numel // self.rows

    @property
    def blocks_per_row(self) -> int:
        """Block constants in a row of bytes."""
        return num_blocks(self.columns, self.block_size)

    @property
    def code_bytes(self) -> int:
        """Bytes of codes in a row."""
        return (self.columns + 1) // 2

    @property
    def scale_bytes(self) -> int:
        """Bytes of block constants in a row."""
        return self.blocks_per_row * (1 if self.double_quant else 4)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.code_bytes + self.scale_bytes

    @property
    def constant_bytes(self) -> int:
        """Bytes of the constants that all rows share."""
        blocks = self.rows * self.blocks_per_row
        return 4 * (num_blocks(blocks, self.absmax_block_size) + 1) if self.double_quant else 0


def to_rows(packed: Tensor, state: QuantState) -> tuple[Tensor, Tensor]:
    """Lay a weight in the flat format out in rows; `RowFormat.of` gives the format.

    Args:
        packed: uint8 ``[(numel + 1) // 2]``.
        state: of the packed weight.
    Returns: rows uint8 ``[fmt.rows, fmt.row_bytes]``; constants uint8 ``[fmt.constant_bytes]``.
    Raises: ValueError: see `RowFormat.of`.
    """
    fmt = RowFormat.of(state)
    if isinstance(state.absmax, DoubleQuant):
        scales = state.absmax.codes
        constants = _as_bytes(torch.cat([state.absmax.absmax, state.absmax.offset.view(1)]))
    else:
        scales = _as_bytes(state.absmax)
        constants = scales.new_empty(0)
    rows = torch.cat([packed.view(fmt.rows, fmt.code_bytes), scales.view(fmt.rows, fmt.scale_bytes)], dim=1)
    return rows, constants


def from_rows(rows: Tensor, constants: Tensor, fmt: RowFormat) -> tuple[Tensor, QuantState]:
    """Undo `to_rows`: the same packed bytes and the same constants.

    Args:
        rows: uint8 ``[fmt.rows, fmt.row_bytes]``.
        constants: uint8 ``[fmt.constant_bytes]``.
        fmt: their layout.
    Returns: packed uint8 ``[(numel + 1) // 2]``; the state.
    Raises: ValueError: the bytes do not fit ``fmt``.
    """
    _check_rows(rows, constants, fmt, num_rows=fmt.rows)
    packed, scales = _copy_flat(rows[:, : fmt.code_bytes]), _copy_flat(rows[:, fmt.code_bytes :])
    absmax: Tensor | DoubleQuant
    if fmt.double_quant:
        nested, offset = _as_floats(constants[:-4]), _as_floats(constants[-4:])[0]
        absmax = DoubleQuant(scales, nested, offset, fmt.absmax_block_size)
    else:
        absmax = scales.view(torch.float32)
    shape = (fmt.out_features, fmt.in_features)
    return packed, QuantState(fmt.quant_type, fmt.block_size, shape, fmt.dtype, absmax)


def dequantize_rows(
    rows: Tensor, constants: Tensor, fmt: RowFormat, dtype: torch.dtype | None = None, *, first_row: int = 0
) -> Tensor:
    """De-quantise all rows of a weight, or any run of them.

    Args:
        rows: uint8 ``[n, fmt.row_bytes]``, rows ``first_row .. first_row + n - 1`` of the layout.
        constants: uint8 ``[fmt.constant_bytes]``, those of the whole weight.
        fmt: layout of the whole weight.
        dtype: type of the result; ``fmt.dtype`` by default.
        first_row: where the run starts.
    Returns: ``[n, in_features]`` (the whole ``[out_features, in_features]`` when ``fmt.rows == 1``), bit-equal to those
        rows of `dequantize_4bit`.
    Raises: ValueError: the bytes do not fit ``fmt``, or the run does not lie within it.
    """
    num_rows = rows.shape[0]
    if not 0 <= first_row <= fmt.rows - num_rows:
        raise ValueError(f"first_row: got {first_row} with {num_rows} rows; the weight is laid out in {fmt.rows} rows")
    _check_rows(rows, constants, fmt, num_rows=num_rows)
    codes = unpack_nibbles(rows[:, : fmt.code_bytes].reshape(-1), num_rows * fmt.columns)
    absmax = _row_absmax(rows[:, fmt.code_bytes :], constants, fmt, first_row=first_row)
    levels = codebook(fmt.quant_type, device=rows.device)
    weight = dequantize_blockwise(codes, absmax, levels, block_size=fmt.block_size, dtype=dtype or fmt.dtype)
    return weight.view(-1, fmt.in_features)


def _row_absmax(scales: Tensor, constants: Tensor, fmt: RowFormat, *, first_row: int) -> Tensor:
    """Return the fp32 absmax of every block of a run of rows ``[num_rows * blocks_per_row]``."""
    if not fmt.double_quant:
        return _as_floats(scales)
    flat = scales.reshape(-1)
    shared = _as_floats(constants)
    first_block = first_row * fmt.blocks_per_row
    block = torch.arange(first_block, first_block + flat.numel(), device=flat.device)  # index in the whole weight
    nested = shared[:-1][block // fmt.absmax_block_size]
    return dynamic_map(signed=True, device=flat.device)[flat.int()] * nested + shared[-1]


def _as_bytes(floats: Tensor) -> Tensor:
    return floats.contiguous().view(torch.uint8)


def _as_floats(raw: Tensor) -> Tensor:
    return _copy_flat(raw).view(torch.float32)


def _copy_flat(raw: Tensor) -> Tensor:
    return raw.clone(memory_format=torch.contiguous_format).view(-1)  # a copy is aligned for any type


def _check_rows(rows: Tensor, constants: Tensor, fmt: RowFormat, *, num_rows: int) -> None:
    if rows.dtype != torch.uint8 or rows.shape != (num_rows, fmt.row_bytes):
        raise ValueError(f"rows: got {rows.dtype} {list(rows.shape)}; {fmt} needs uint8 [{num_rows}, {fmt.row_bytes}]")
    if constants.dtype != torch.uint8 or constants.shape != (fmt.constant_bytes,):
        raise ValueError(
            f"constants: got {constants.dtype} {list(constants.shape)}; {fmt} needs uint8 [{fmt.constant_bytes}]"
        )
