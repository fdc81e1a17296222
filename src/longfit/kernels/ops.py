"""The operations as torch operators ``longfit::<name>``: schema, argument checks, shapes for tracing.

A torch operator takes tensors and plain values, so `QuantState` and `RowFormat` arrive here taken apart (`dispatch.py`
does that) and are put together again for the backend. Per operation there are two functions: ``_fake_*`` checks the
arguments and returns empty results, which is all that tracing needs; ``_run_*`` makes the same checks and calls the
backend, which trusts what it gets.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longfit.numerics.absmax import check_absmax, check_block_size, num_blocks
from longfit.numerics.double_quant import STORAGES, DoubleQuant
from longfit.numerics.quant_state import QuantState, check_format
from longfit.numerics.row_format import RowFormat

# Finds the backend's function for an operation on a device, at each call.
Find = Callable[[str, torch.device], Callable[..., Any]]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Outlives every call: torch takes the operators away when their Library is deleted.
LIBRARY = torch.library.Library("longfit", "DEF")


def register(find: Find) -> None:
    """Define all operators; each call of one asks ``find`` for the function that does the work."""
    for name, (schema, run, fake) in _OPERATORS.items():
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, lambda *args, run=run: run(find, *args), "CompositeExplicitAutograd")
        torch.library.register_fake(f"longfit::{name}", fake, lib=LIBRARY)


def _fake_quantize_4bit(
    weight: Tensor, quant_type: str, block_size: int, double_quant: bool, absmax_block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_format(quant_type, block_size, absmax_block_size)
    _check_float("weight", weight)
    blocks = num_blocks(weight.numel(), block_size)
    packed = weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    scales = weight.new_empty(blocks, dtype=torch.uint8 if double_quant else torch.float32)
    nested = weight.new_empty(num_blocks(blocks, absmax_block_size) if double_quant else 0, dtype=torch.float32)
    return packed, scales, nested, weight.new_empty((), dtype=torch.float32)


def _run_quantize_4bit(
    find: Find, weight: Tensor, quant_type: str, block_size: int, double_quant: bool, absmax_block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_format(quant_type, block_size, absmax_block_size)
    _check_float("weight", weight)
    packed, state = find("quantize_4bit", weight.device)(
        weight,
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        absmax_block_size=absmax_block_size,
    )
    if isinstance(state.absmax, DoubleQuant):
        return packed, state.absmax.codes, state.absmax.absmax, state.absmax.offset
    empty = weight.new_empty(0, dtype=torch.float32)
    return packed, state.absmax, empty, weight.new_zeros((), dtype=torch.float32)


def _fake_dequantize_4bit(
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    storage: str,
    absmax_block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    state = _state(scales, nested, offset, shape, quant_type, block_size, storage, absmax_block_size, dtype)
    _check_packed(packed, state)
    _check_dtype(dtype)
    return packed.new_empty(state.shape, dtype=dtype)


def _run_dequantize_4bit(
    find: Find,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    storage: str,
    absmax_block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    state = _state(scales, nested, offset, shape, quant_type, block_size, storage, absmax_block_size, dtype)
    _check_packed(packed, state)
    _check_dtype(dtype)
    return find("dequantize_4bit", packed.device)(packed, state, dtype)


def _fake_quantize_8bit(values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    _check_float("values", values)
    _check_codebook(codebook)
    blocks = num_blocks(values.numel(), check_block_size(block_size))
    return values.new_empty(values.numel(), dtype=torch.uint8), values.new_empty(blocks, dtype=torch.float32)


def _run_quantize_8bit(find: Find, values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    _check_float("values", values)
    _check_codebook(codebook)
    if bool(codebook.isnan().any()):
        raise ValueError("codebook: holds NaN, which is nearest to nothing; leave those levels out")
    check_block_size(block_size)
    return find("quantize_8bit", values.device)(values, codebook, block_size=block_size)


def _fake_dequantize_8bit(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    _check_8bit(codes, absmax, codebook, block_size, dtype)
    return codes.new_empty(codes.numel(), dtype=dtype)


def _run_dequantize_8bit(
    find: Find, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    _check_8bit(codes, absmax, codebook, block_size, dtype)
    run = find("dequantize_8bit", codes.device)
    return run(codes, absmax, codebook, block_size=block_size, dtype=dtype)


def _fake_dequantize_rows(rows: Tensor, constants: Tensor, *fields: Any) -> Tensor:
    *weight, dtype, first_row = fields
    layout = _layout(*weight)
    _check_rows(rows, constants, layout, first_row)
    _check_dtype(dtype)
    fmt = layout.fmt
    return rows.new_empty(rows.shape[0] * fmt.columns // fmt.in_features, fmt.in_features, dtype=dtype)


def _run_dequantize_rows(find: Find, rows: Tensor, constants: Tensor, *fields: Any) -> Tensor:
    *weight, dtype, first_row = fields
    layout = _layout(*weight)
    _check_rows(rows, constants, layout, first_row)
    _check_dtype(dtype)
    return find("dequantize_rows", rows.device)(rows, constants, layout.fmt, dtype, first_row=first_row)


def _fake_linear_4bit(x: Tensor, rows: Tensor, constants: Tensor, *weight: Any) -> Tensor:
    layout = _layout(*weight)
    _check_matmul("x", x, layout.fmt.in_features, rows, constants, layout)
    return x.new_empty(*x.shape[:-1], layout.fmt.out_features)


def _run_linear_4bit(find: Find, x: Tensor, rows: Tensor, constants: Tensor, *weight: Any) -> Tensor:
    layout = _layout(*weight)
    _check_matmul("x", x, layout.fmt.in_features, rows, constants, layout)
    return find("linear_4bit", x.device)(x, rows, constants, layout.fmt)


def _fake_linear_4bit_grad_input(grad: Tensor, rows: Tensor, constants: Tensor, *weight: Any) -> Tensor:
    layout = _layout(*weight)
    _check_matmul("grad", grad, layout.fmt.out_features, rows, constants, layout)
    return grad.new_empty(*grad.shape[:-1], layout.fmt.in_features)


def _run_linear_4bit_grad_input(find: Find, grad: Tensor, rows: Tensor, constants: Tensor, *weight: Any) -> Tensor:
    layout = _layout(*weight)
    _check_matmul("grad", grad, layout.fmt.out_features, rows, constants, layout)
    return find("linear_4bit_grad_input", grad.device)(grad, rows, constants, layout.fmt)


_ROWS = (
    "Tensor rows, Tensor constants, int out_features, int in_features, str quant_type, int block_size, "
    "bool double_quant, int absmax_block_size"
)
_OPERATORS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "quantize_4bit": (
        "(Tensor weight, str quant_type, int block_size, bool double_quant, int absmax_block_size)"
        " -> (Tensor packed, Tensor scales, Tensor nested, Tensor offset)",
        _run_quantize_4bit,
        _fake_quantize_4bit,
    ),
    "dequantize_4bit": (
        "(Tensor packed, Tensor scales, Tensor? nested, Tensor? offset, SymInt[] shape, str quant_type,"
        " int block_size, str storage, int absmax_block_size, ScalarType dtype) -> Tensor",
        _run_dequantize_4bit,
        _fake_dequantize_4bit,
    ),
    "quantize_8bit": (
        "(Tensor values, Tensor codebook, int block_size) -> (Tensor codes, Tensor absmax)",
        _run_quantize_8bit,
        _fake_quantize_8bit,
    ),
    "dequantize_8bit": (
        "(Tensor codes, Tensor absmax, Tensor codebook, int block_size, ScalarType dtype) -> Tensor",
        _run_dequantize_8bit,
        _fake_dequantize_8bit,
    ),
    "dequantize_rows": (
        f"({_ROWS}, ScalarType dtype, int first_row) -> Tensor",
        _run_dequantize_rows,
        _fake_dequantize_rows,
    ),
    "linear_4bit": (f"(Tensor x, {_ROWS}) -> Tensor", _run_linear_4bit, _fake_linear_4bit),
    "linear_4bit_grad_input": (
        f"(Tensor grad, {_ROWS}) -> Tensor",
        _run_linear_4bit_grad_input,
        _fake_linear_4bit_grad_input,
    ),
}


class _Layout:
    """A row format and the sizes that every call is checked against, computed once per format."""

    def __init__(self, *fields: Any) -> None:
        self.fmt = RowFormat(*fields)
        self.rows, self.row_bytes, self.constant_bytes = self.fmt.rows, self.fmt.row_bytes, self.fmt.constant_bytes


@cache
def _layout(*fields: Any) -> _Layout:
    """Return the layout with these fields; cached, as a matmul in generation takes only some microseconds."""
    return _Layout(*fields)


def _state(
    scales: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    storage: str,
    absmax_block_size: int,
    dtype: torch.dtype,
) -> QuantState:
    absmax: Tensor | DoubleQuant = scales
    if nested is not None and offset is not None:
        if storage not in STORAGES:
            raise ValueError(f"storage: got {storage!r}; allowed: {', '.join(STORAGES)}")
        if scales.dtype != torch.uint8 or offset.dtype != torch.float32 or offset.numel() != 1:
            raise ValueError(
                f"absmax: got {scales.dtype} codes and a {offset.dtype} {list(offset.shape)} offset; "
                "double quantisation stores uint8 codes and one float32 offset"
            )
        check_absmax(nested, scales.numel(), absmax_block_size)
        absmax = DoubleQuant(scales, nested, offset, absmax_block_size, storage)
    elif scales.dtype != torch.float32:
        raise ValueError(f"absmax: got {scales.dtype}; without double quantisation it is float32")
    return QuantState(quant_type, block_size, tuple(shape), dtype, absmax)


def _check_float(name: str, values: Tensor) -> None:
    if values.dtype not in FLOATS:
        raise TypeError(f"{name}: got {values.dtype}; allowed: float16, bfloat16, float32, float64; convert it first")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype}; allowed: float16, bfloat16, float32, float64")


def _check_packed(packed: Tensor, state: QuantState) -> None:
    if packed.dtype != torch.uint8 or packed.shape != ((state.numel + 1) // 2,):
        raise ValueError(
            f"packed: got {packed.dtype} {list(packed.shape)}; a weight of {list(state.shape)} needs "
            f"uint8 [{(state.numel + 1) // 2}]; view stored bf16 or fp32 as uint8 and flatten it"
        )


def _check_codebook(codebook: Tensor) -> None:
    if codebook.dtype != torch.float32 or codebook.dim() != 1 or not 2 <= codebook.numel() <= 256:
        raise ValueError(f"codebook: got {codebook.dtype} {list(codebook.shape)}; allowed: float32 [2] to [256]")


def _check_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype) -> None:
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: got {codes.dtype}; allowed: uint8")
    if codebook.dtype != torch.float32 or codebook.shape != (256,):
        # A shorter one could be read past its end: codes are bytes.
        raise ValueError(f"codebook: got {codebook.dtype} {list(codebook.shape)}; allowed: float32 [256]")
    check_absmax(absmax, codes.numel(), check_block_size(block_size))
    _check_dtype(dtype)


def _check_rows(rows: Tensor, constants: Tensor, layout: _Layout, first_row: int) -> None:
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != layout.row_bytes:
        raise ValueError(f"rows: got {rows.dtype} {list(rows.shape)}; {layout.fmt} needs uint8 [n, {layout.row_bytes}]")
    if not 0 <= first_row <= layout.rows - rows.shape[0]:
        raise ValueError(
            f"first_row: got {first_row} with {rows.shape[0]} rows; the weight is laid out in {layout.rows}"
        )
    if constants.dtype != torch.uint8 or constants.dim() != 1 or constants.shape[0] != layout.constant_bytes:
        raise ValueError(
            f"constants: got {constants.dtype} {list(constants.shape)}; {layout.fmt} needs "
            f"uint8 [{layout.constant_bytes}]"
        )


def _check_matmul(name: str, x: Tensor, features: int, rows: Tensor, constants: Tensor, layout: _Layout) -> None:
    _check_float(name, x)
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"{name}: got {list(x.shape)}; the last axis must be {features} for {layout.fmt}")
    _check_rows(rows, constants, layout, 0)
    if rows.shape[0] != layout.rows:
        raise ValueError(f"rows: got {rows.shape[0]}; a matmul needs all {layout.rows} rows of {layout.fmt}")
    if rows.device != x.device:
        raise ValueError(f"{name}: on {x.device}, the weight is on {rows.device}; move one of them")
