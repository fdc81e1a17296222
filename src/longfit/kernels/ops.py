"""The operations as torch operators ``longfit::<name>``: schema, checked arguments, shapes for tracing.

A torch operator takes tensors and plain values, so `QuantState` and `RowFormat` are taken apart on the way into one
(``split``) and put together behind it (``join``). Per operation there are two functions: ``_check_*`` refuses what does
not go together and returns the arguments of the backend, which trusts them; ``_empty_*`` turns those into empty
results, which is all that tracing needs.

On the way through torch's dispatcher a call of an operator written in Python takes some 10 microseconds, as long as a
small de-quantisation. So a call that nobody watches, which is nearly every one, goes to the checks and the backend as
it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longfit.compat.torch import dispatch_mode_is_active
from longfit.kernels.checks import (
    check_codebook,
    check_dtype,
    check_float,
    check_matmul,
    check_packed,
    check_rows,
    row_sizes_of,
)
from longfit.numerics.absmax import check_absmax, check_block_size, num_blocks
from longfit.numerics.double_quant import DoubleQuant
from longfit.numerics.quant_state import QuantState, check_format
from longfit.numerics.row_format import RowFormat

# Finds the backend's function for an operation on a device, at each call.
Find = Callable[[str, torch.device], Callable[..., Any]]

# Positional and keyword arguments of a backend's function.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

PLAIN = (Tensor, torch.nn.Parameter)

# Outlives every call: torch takes the operators away when their Library is deleted.
LIBRARY = torch.library.Library("longfit", "DEF")


def _unchanged(result: Any, *_args: Any) -> Any:
    return result


def _as_they_are(*args: Any) -> tuple[Any, ...]:
    return args


@dataclass(frozen=True)
class _Operator:
    """What torch must know of an operation.

    Attributes:
        schema: arguments and results as torch writes them.
        check: the caller's arguments -> those of the backend.
        empty: the backend's arguments -> results of the right shapes and types.
        check_values: looks at the numbers, of which tracing has none.
        split: the caller's arguments -> the operator's.
        join: the operator's arguments -> the caller's.
        split_result: what the backend returns -> the operator's tensors.
        join_result: the operator's tensors, the caller's arguments -> what the backend returns.
    """

    schema: str
    check: Callable[..., Arguments]
    empty: Callable[..., Any]
    check_values: Callable[..., None] | None = None
    split: Callable[..., tuple[Any, ...]] = _as_they_are
    join: Callable[..., tuple[Any, ...]] = _as_they_are
    split_result: Callable[[Any], Any] = _unchanged
    join_result: Callable[..., Any] = _unchanged

    def trace(self, *args: Any) -> Any:
        positional, named = self.check(*self.join(*args))
        return self.empty(*positional, **named)


def register(find: Find) -> dict[str, Callable[..., Any]]:
    """Define all operators; each call of one asks ``find`` for the function that does the work.

    Returns: by name, the function that calls an operator with the caller's arguments.
    """
    return {name: _define(name, operator, find) for name, operator in _OPERATORS.items()}


def _define(name: str, operator: _Operator, find: Find) -> Callable[..., Any]:
    check, check_values = operator.check, operator.check_values

    def run(*args: Any) -> Any:
        positional, named = check(*args)
        if check_values is not None:
            check_values(*args)
        return find(name, args[0].device)(*positional, **named)

    def run_split(*args: Any) -> Any:
        return operator.split_result(run(*operator.join(*args)))

    def call(*args: Any) -> Any:
        if not _watched(args[0]):
            return run(*args)
        return operator.join_result(getattr(torch.ops.longfit, name).default(*operator.split(*args)), *args)

    LIBRARY.define(name + operator.schema)
    LIBRARY.impl(name, run_split, "CompositeExplicitAutograd")
    torch.library.register_fake(f"longfit::{name}", operator.trace, lib=LIBRARY)
    return call


def _watched(tensor: Tensor) -> bool:
    """Whether someone must see the operator and not its effect: a tracer, a dispatch mode, a subclass, autograd."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in PLAIN
        or dispatch_mode_is_active()
        or (tensor.requires_grad and torch.is_grad_enabled())
        or torch.jit.is_tracing()
    )


def _check_quantize_4bit(
    weight: Tensor, quant_type: str, block_size: int, double_quant: bool, absmax_block_size: int
) -> Arguments:
    check_format(quant_type, block_size, absmax_block_size)
    check_float("weight", weight)
    return (weight,), {
        "quant_type": quant_type,
        "block_size": block_size,
        "double_quant": double_quant,
        "absmax_block_size": absmax_block_size,
    }


def _empty_quantize_4bit(
    weight: Tensor, *, quant_type: str, block_size: int, double_quant: bool, absmax_block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks = num_blocks(weight.numel(), block_size)
    packed = weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    scales = weight.new_empty(blocks, dtype=torch.uint8 if double_quant else torch.float32)
    nested = weight.new_empty(num_blocks(blocks, absmax_block_size) if double_quant else 0, dtype=torch.float32)
    return packed, scales, nested, weight.new_empty((), dtype=torch.float32)


def _split_quantized(result: tuple[Tensor, QuantState]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed, state = result
    if isinstance(state.absmax, DoubleQuant):
        return packed, state.absmax.codes, state.absmax.absmax, state.absmax.offset
    return packed, state.absmax, state.absmax.new_empty(0), state.absmax.new_zeros(())


def _join_quantized(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    weight: Tensor,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    absmax_block_size: int,
) -> tuple[Tensor, QuantState]:
    packed, scales, nested, offset = tensors
    absmax = DoubleQuant(scales, nested, offset, absmax_block_size) if double_quant else scales
    return packed, QuantState(quant_type, block_size, tuple(weight.shape), weight.dtype, absmax)


def _check_dequantize_4bit(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Arguments:
    check_packed(packed, state)
    check_dtype(dtype)
    return (packed, state, dtype), {}


def _split_state(packed: Tensor, state: QuantState, dtype: torch.dtype) -> tuple[Any, ...]:
    absmax = state.absmax
    if isinstance(absmax, DoubleQuant):
        constants = absmax.codes, absmax.absmax, absmax.offset
        absmax_block_size = absmax.absmax_block_size
    else:
        constants, absmax_block_size = (absmax, None, None), 256  # type: ignore[assignment]
    return (
        packed,
        *constants,
        state.shape,
        state.quant_type,
        state.block_size,
        absmax_block_size,
        dtype,
    )


def _join_state(packed: Tensor, *parts: Any) -> tuple[Any, ...]:
    return packed, _state(*parts), parts[-1]


def _empty_dequantize_4bit(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(state.shape, dtype=dtype)


def _check_quantize_8bit(values: Tensor, codebook: Tensor, block_size: int) -> Arguments:
    check_float("values", values)
    check_codebook(codebook)
    return (values, codebook), {"block_size": check_block_size(block_size)}


def _refuse_nan(_values: Tensor, codebook: Tensor, _block_size: int) -> None:
    if bool(codebook.isnan().any()):
        raise ValueError("codebook: holds NaN, which is nearest to nothing; leave those levels out")


def _empty_quantize_8bit(values: Tensor, codebook: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    blocks = num_blocks(values.numel(), block_size)
    return values.new_empty(values.numel(), dtype=torch.uint8), values.new_empty(blocks, dtype=torch.float32)


def _check_dequantize_8bit(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Arguments:
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: got {codes.dtype}; allowed: uint8")
    if codebook.dtype != torch.float32 or codebook.shape != (256,):
        # A shorter one could be read past its end: codes are bytes.
        raise ValueError(f"codebook: got {codebook.dtype} {list(codebook.shape)}; allowed: float32 [256]")
    check_absmax(absmax, codes.numel(), check_block_size(block_size))
    check_dtype(dtype)
    return (codes, absmax, codebook), {"block_size": block_size, "dtype": dtype}


def _empty_dequantize_8bit(
    codes: Tensor, absmax: Tensor, codebook: Tensor, *, block_size: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.numel(), dtype=dtype)


def _check_dequantize_rows(
    rows: Tensor, constants: Tensor, fmt: RowFormat, dtype: torch.dtype, first_row: int
) -> Arguments:
    check_rows(rows, constants, row_sizes_of(fmt), first_row)
    check_dtype(dtype)
    return (rows, constants, fmt, dtype), {"first_row": first_row}


def _empty_dequantize_rows(
    rows: Tensor, constants: Tensor, fmt: RowFormat, dtype: torch.dtype, *, first_row: int
) -> Tensor:
    return rows.new_empty(rows.shape[0] * fmt.columns // fmt.in_features, fmt.in_features, dtype=dtype)


def _check_linear_4bit(x: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat) -> Arguments:
    check_matmul("x", x, fmt.in_features, rows, constants, row_sizes_of(fmt))
    return (x, rows, constants, fmt), {}


def _empty_linear_4bit(x: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat) -> Tensor:
    return x.new_empty(*x.shape[:-1], fmt.out_features)


def _check_linear_4bit_grad_input(grad: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat) -> Arguments:
    check_matmul("grad", grad, fmt.out_features, rows, constants, row_sizes_of(fmt))
    return (grad, rows, constants, fmt), {}


def _empty_linear_4bit_grad_input(grad: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], fmt.in_features)


def _split_format(*args: Any) -> tuple[Any, ...]:
    """Put a format's fields in its place: the third of `dequantize_rows`, the fourth of the matmuls."""
    at = 2 if isinstance(args[2], RowFormat) else 3
    return *args[:at], *format_fields(args[at]), *args[at + 1 :]


def format_fields(fmt: RowFormat) -> tuple[int, int, str, int, bool, int]:
    """Return what an operator takes of a row format; the dtype of the weight is not part of its layout."""
    return (
        fmt.out_features,
        fmt.in_features,
        fmt.quant_type,
        fmt.block_size,
        fmt.double_quant,
        fmt.absmax_block_size,
    )


def _join_rows(rows: Tensor, constants: Tensor, *rest: Any) -> tuple[Any, ...]:
    return rows, constants, _format(*rest[:6]), *rest[6:]


def _join_matmul(x: Tensor, rows: Tensor, constants: Tensor, *fields: Any) -> tuple[Any, ...]:
    return x, rows, constants, _format(*fields)


@cache
def _format(*fields: Any) -> RowFormat:
    return RowFormat(*fields)


_ROWS = (
    "Tensor rows, Tensor constants, int out_features, int in_features, str quant_type, int block_size, "
    "bool double_quant, int absmax_block_size"
)
_OPERATORS = {
    "quantize_4bit": _Operator(
        "(Tensor weight, str quant_type, int block_size, bool double_quant, int absmax_block_size)"
        " -> (Tensor packed, Tensor scales, Tensor nested, Tensor offset)",
        _check_quantize_4bit,
        _empty_quantize_4bit,
        split_result=_split_quantized,
        join_result=_join_quantized,
    ),
    "dequantize_4bit": _Operator(
        "(Tensor packed, Tensor scales, Tensor? nested, Tensor? offset, SymInt[] shape, str quant_type,"
        " int block_size, int absmax_block_size, ScalarType dtype) -> Tensor",
        _check_dequantize_4bit,
        _empty_dequantize_4bit,
        split=_split_state,
        join=_join_state,
    ),
    "quantize_8bit": _Operator(
        "(Tensor values, Tensor codebook, int block_size) -> (Tensor codes, Tensor absmax)",
        _check_quantize_8bit,
        _empty_quantize_8bit,
        check_values=_refuse_nan,
    ),
    "dequantize_8bit": _Operator(
        "(Tensor codes, Tensor absmax, Tensor codebook, int block_size, ScalarType dtype) -> Tensor",
        _check_dequantize_8bit,
        _empty_dequantize_8bit,
    ),
    "dequantize_rows": _Operator(
        f"({_ROWS}, ScalarType dtype, int first_row) -> Tensor",
        _check_dequantize_rows,
        _empty_dequantize_rows,
        split=_split_format,
        join=_join_rows,
    ),
    "linear_4bit": _Operator(
        f"(Tensor x, {_ROWS}) -> Tensor",
        _check_linear_4bit,
        _empty_linear_4bit,
        split=_split_format,
        join=_join_matmul,
    ),
    "linear_4bit_grad_input": _Operator(
        f"(Tensor grad, {_ROWS}) -> Tensor",
        _check_linear_4bit_grad_input,
        _empty_linear_4bit_grad_input,
        split=_split_format,
        join=_join_matmul,
    ),
}


def _state(
    scales: Tensor,
    nested: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    absmax_block_size: int,
    dtype: torch.dtype,
) -> QuantState:
    absmax: Tensor | DoubleQuant = scales
    if nested is not None and offset is not None:
        if scales.dtype != torch.uint8 or offset.dtype != torch.float32 or offset.numel() != 1:
            raise ValueError(
                f"absmax: got {scales.dtype} codes and a {offset.dtype} {list(offset.shape)} offset; "
                "double quantisation stores uint8 codes and one float32 offset"
            )
        check_absmax(nested, scales.numel(), absmax_block_size)
        absmax = DoubleQuant(scales, nested, offset, absmax_block_size)
    elif scales.dtype != torch.float32:
        raise ValueError(f"absmax: got {scales.dtype}; without double quantisation it is float32")
    return QuantState(quant_type, block_size, tuple(shape), dtype, absmax)
