"""Double quantisation of block constants: exact nearest codes, two roundings, parity with bitsandbytes."""

import math

import bitsandbytes.functional
import pytest
import torch
from torch import Tensor

from longfit.numerics.codebooks import dynamic_map
from longfit.numerics.double_quant import DoubleQuant, dequantize_absmax, quantize_absmax


def typical_absmax(num_blocks: int) -> Tensor:
    return torch.randn(num_blocks, 64).abs().amax(1) * 0.02


@pytest.mark.parametrize("num_blocks", [1, 2, 255, 256, 257, 5000])
def test_offset_codes_and_constants_are_the_formats(num_blocks: int) -> None:
    absmax = typical_absmax(num_blocks)
    double = quantize_absmax(absmax)
    levels = dynamic_map(signed=True)
    assert torch.equal(double.offset, absmax.mean())
    assert double.absmax.shape == (math.ceil(num_blocks / 256),)
    for i, block in enumerate((absmax - absmax.mean()).split(256)):
        assert double.absmax[i] == block.abs().max()
        scaled = (block * (1 / double.absmax[i].clamp(min=1e-38))).clamp(-1, 1)
        nearest = (scaled[:, None] > (levels[:-1] + levels[1:]) / 2).sum(1)  # thresholds strictly below
        assert torch.equal(double.codes[i * 256 : i * 256 + len(block)], nearest.to(torch.uint8))


def test_bitsandbytes_decodes_the_codes_alike_and_writes_those_its_table_resolves() -> None:
    absmax, levels = typical_absmax(20_000), dynamic_map(signed=True)
    double = quantize_absmax(absmax)
    theirs, state = bitsandbytes.functional.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(double.absmax, state.absmax)
    decoded = bitsandbytes.functional.dequantize_blockwise(double.codes, state) + double.offset
    assert torch.equal(dequantize_absmax(double), decoded)
    # It rounds scaled values to one of 65,536 places in [-1, 1] before looking the code up: only a value closer than
    # one place to a threshold can get another code than the nearest.
    scaled = (absmax - absmax.mean()) * double.absmax.reciprocal().repeat_interleave(256)[: absmax.numel()]
    resolved = (scaled[:, None] - (levels[:-1] + levels[1:]) / 2).abs().amin(1) > 2 / 65_535
    assert resolved.float().mean() > 0.95
    assert torch.equal(double.codes[resolved], theirs[resolved])


def test_decoding_rounds_twice() -> None:
    double = quantize_absmax(typical_absmax(20_000))
    levels = dynamic_map(signed=True)[double.codes.int()]
    nested = double.absmax.repeat_interleave(256)[: levels.numel()]
    fused = (levels.double() * nested.double() + double.offset.double()).float()  # one rounding, as an fma does it
    decoded = dequantize_absmax(double)
    assert torch.equal(decoded, levels * nested + double.offset)
    assert (decoded != fused).float().mean() > 0.01  # so the line above tells the two apart


def test_error_is_at_most_half_a_step() -> None:
    absmax = typical_absmax(4000)
    double = quantize_absmax(absmax, absmax_block_size=128)
    error = (dequantize_absmax(double) - absmax).abs()
    nested = double.absmax.repeat_interleave(128)[:4000]
    # The widest step of the map, at its top: 0.9 / 64 of linspace(0.1, 1, 65), half of it in error.
    # 2^-20: a few fp32 roundings, relative to the offset.
    assert (error <= nested * (0.9 / 64 / 2) + double.offset * 2.0**-20).all()


def test_equal_constants_and_none_at_all() -> None:
    double = quantize_absmax(torch.full((300,), 0.25))
    assert double.absmax.tolist() == [0, 0]
    assert (double.codes == 127).all()  # level 0
    assert torch.equal(dequantize_absmax(double), torch.full((300,), 0.25))
    nothing = quantize_absmax(torch.empty(0))
    assert nothing.offset == 0
    assert dequantize_absmax(nothing).shape == (0,)


def test_one_nan_shows_everywhere() -> None:
    absmax = typical_absmax(600)
    absmax[3] = math.nan
    assert dequantize_absmax(quantize_absmax(absmax)).isnan().all()


def test_size_format_bytes() -> None:
    assert quantize_absmax(typical_absmax(1000)).nbytes == 1000 + 4 * 4 + 4


def test_bad_arguments_say_what_is_allowed() -> None:
    absmax = typical_absmax(10)
    for wrong in (absmax.double(), absmax.view(2, 5)):
        with pytest.raises(ValueError, match=r"absmax: got .*allowed: float32 \[num_blocks\]"):
            quantize_absmax(wrong)
    double = quantize_absmax(absmax)
    with pytest.raises(ValueError, match=r"offset torch\.bfloat16"):
        DoubleQuant(double.codes, double.absmax, double.offset.bfloat16())
    with pytest.raises(ValueError, match=r"10 values in blocks of 5 need float32 \[2\]"):
        DoubleQuant(double.codes, double.absmax, double.offset, absmax_block_size=5)
