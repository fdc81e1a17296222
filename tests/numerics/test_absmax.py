"""INT8 absmax quantisation: golden codes, the error bound, and what zeros, NaN and infinities become."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longfit.numerics.absmax import dequantize_int8, quantize_int8

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def test_golden_codes_of_the_papers_equation() -> None:
    values = torch.tensor([[0.5, -1.0, 0.25, 1.0], [0.0, -0.5, 0.004, -0.003]])
    codes, absmax = quantize_int8(values)
    # c = 127: 63.5 rounds to the even 64, 31.75 to 32, -63.5 to -64, 0.508 to 1, -0.381 to 0
    assert codes.tolist() == [[64, -127, 32, 127], [0, -64, 1, 0]]
    assert absmax.tolist() == [1.0]
    by_row, absmax = quantize_int8(values, block_size=4)
    assert by_row.tolist() == [[64, -127, 32, 127], [0, -127, 1, -1]]
    assert absmax.tolist() == [1.0, 0.5]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    numel=st.integers(1, 200),
    block_size=st.none() | st.integers(1, 70),
    exponent=st.integers(-36, 38),
    dtype=st.sampled_from(FLOATS),
)
def test_error_is_at_most_half_a_step(
    seed: int, numel: int, block_size: int | None, exponent: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(numel, generator=generator, dtype=torch.float64) * 2 - 1) * 10.0**exponent
    largest = torch.finfo(dtype).max
    values = values.clamp(-largest, largest).to(dtype)
    codes, absmax = quantize_int8(values, block_size=block_size)
    back = dequantize_int8(codes, absmax, block_size=block_size, dtype=dtype)
    per_value = absmax.double().repeat_interleave(block_size or numel)[:numel].clamp(min=1e-36)
    # Half a step; c, the product and the quotient round to 2^-24 each at up to 127 steps; then one rounding to dtype
    # (relative eps / 2 of at most absmax), its subnormal spacing, and fp64's rounding to fp32 on the way in.
    steps = 0.5 + 127 * 4 * 2.0**-24
    bound = per_value * (steps / 127 + torch.finfo(dtype).eps / 2) + torch.finfo(dtype).smallest_normal
    assert ((back.double() - values.double()).abs() <= bound).all()
    assert codes.abs().max() <= 127
    assert torch.equal(quantize_int8(-values, block_size=block_size)[0], -codes)


def test_an_outlier_harms_only_its_block() -> None:
    values = torch.randn(1024)
    values[100] = 1000.0
    errors = {}
    for block_size in (None, 64):
        back = dequantize_int8(
            *quantize_int8(values, block_size=block_size), block_size=block_size, dtype=torch.float32
        )
        errors[block_size] = (back - values).abs()
    elsewhere = torch.ones(1024, dtype=torch.bool)
    elsewhere[64:128] = False
    assert errors[None][elsewhere].max() > 1  # steps of 1000 / 127: almost everything becomes 0
    assert errors[64][elsewhere].max() <= values[elsewhere].abs().max() / 254 * (1 + 2.0**-15)  # 127 * 4 * 2^-24


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_nan_or_infinity_loses_exactly_its_block(broken: float, dtype: torch.dtype) -> None:
    values = torch.randn(12, dtype=dtype)
    whole = dequantize_int8(*quantize_int8(values, block_size=4), block_size=4, dtype=dtype)
    values[5] = broken
    codes, absmax = quantize_int8(values, block_size=4)
    back = dequantize_int8(codes, absmax, block_size=4, dtype=dtype)
    assert back[4:8].isnan().all()
    assert codes[4:8].tolist() == [0] * 4
    assert torch.equal(back[:4], whole[:4])
    assert torch.equal(back[8:], whole[8:])


def test_zeros_scalars_strides_and_nothing() -> None:
    codes, absmax = quantize_int8(torch.zeros(5), block_size=2)
    assert codes.tolist() == [0] * 5
    assert absmax.tolist() == [0, 0, 0]
    assert dequantize_int8(codes, absmax, block_size=2, dtype=torch.float16).tolist() == [0] * 5
    assert dequantize_int8(*quantize_int8(torch.tensor(-3.0)), dtype=torch.float32).shape == ()
    assert quantize_int8(torch.empty(0, 4))[1].numel() == 0
    transposed = torch.randn(6, 4).t()
    assert torch.equal(quantize_int8(transposed)[0], quantize_int8(transposed.contiguous())[0])
    assert not quantize_int8(torch.randn(3, requires_grad=True))[1].requires_grad


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_the_largest_finite_value_stays_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([largest, -largest, largest / 3], dtype=dtype)
    back = dequantize_int8(*quantize_int8(values), dtype=dtype)
    assert back.isfinite().all()
    assert back[0] >= largest * (1 - torch.finfo(dtype).eps)  # one ulp: c and the quotient are rounded


def test_bad_arguments_say_what_is_allowed() -> None:
    with pytest.raises(TypeError, match=r"got torch.int32; allowed: float16"):
        quantize_int8(torch.ones(3, dtype=torch.int32))
    for wrong in (0, -4, 2.0, True):
        with pytest.raises(ValueError, match=r"block_size: got .*at least 1"):
            quantize_int8(torch.ones(3), block_size=wrong)  # type: ignore[arg-type]
    codes, absmax = quantize_int8(torch.ones(8), block_size=4)
    with pytest.raises(ValueError, match=r"8 values in blocks of 2 need float32 \[4\]"):
        dequantize_int8(codes, absmax, block_size=2, dtype=torch.float32)
