"""What the operations refuse, and that each refusal says what is allowed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longfit.kernels import dispatch
from longfit.numerics import quant_state, row_format
from longfit.numerics.codebooks import dynamic_map
from longfit.numerics.row_format import RowFormat


def test_errors_say_what_is_allowed() -> None:
    packed, state = quant_state.quantize_4bit(torch.randn(40, 192).bfloat16())
    fmt, (rows, constants) = RowFormat.of(state), row_format.to_rows(packed, state)
    packed, state = dispatch.quantize_4bit(torch.randn(64))
    book = dynamic_map(signed=True)
    x = torch.randn(2, 192)
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (TypeError, "float16, bfloat16", lambda: dispatch.quantize_4bit(torch.arange(64))),
        (ValueError, "nf4, fp4, int4", lambda: dispatch.quantize_4bit(torch.randn(64), quant_type="nf5")),
        (ValueError, "try block_size=64", lambda: dispatch.quantize_4bit(torch.randn(64), block_size=48)),
        (ValueError, r"uint8 \[32\]", lambda: dispatch.dequantize_4bit(packed[:-1], state)),
        (TypeError, "dtype: got torch.int8", lambda: dispatch.dequantize_4bit(packed, state, torch.int8)),
        (ValueError, r"float32 \[2\] to", lambda: dispatch.quantize_8bit(x, book.half(), block_size=64)),
        (ValueError, "holds NaN", lambda: dispatch.quantize_8bit(x, book * float("nan"), block_size=64)),
        (ValueError, "try block_size=64", lambda: dispatch.quantize_8bit(x, book, block_size=0)),
        (ValueError, r"float32 \[256\]", lambda: _dequantize_8bit(packed, torch.ones(1), book[:9])),
        (ValueError, "need float32", lambda: _dequantize_8bit(packed, torch.ones(2), book)),
        (ValueError, "last axis must be 192", lambda: dispatch.linear_4bit(x[:, 1:], rows, constants, fmt)),
        (ValueError, "needs all 40 rows", lambda: dispatch.linear_4bit(x, rows[1:], constants, fmt)),
        (TypeError, "convert it first", lambda: dispatch.linear_4bit(x.int(), rows, constants, fmt)),
        (ValueError, "rows: got", lambda: dispatch.linear_4bit(x, rows[:, 1:], constants, fmt)),
        (ValueError, "constants: got", lambda: dispatch.linear_4bit(x, rows, constants[1:], fmt)),
        (ValueError, "last axis must be 40", lambda: dispatch.linear_4bit_grad_input(x, rows, constants, fmt)),
        (ValueError, "first_row: got 39", lambda: dispatch.dequantize_rows(rows[:2], constants, fmt, first_row=39)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def _dequantize_8bit(codes: Tensor, absmax: Tensor, book: Tensor) -> Tensor:
    return dispatch.dequantize_8bit(codes, absmax, book, block_size=64, dtype=torch.float32)
