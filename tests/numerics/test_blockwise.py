"""Block-wise quantisation: the nearest-level rule to the last bit, awkward sizes, lost blocks, bounded memory."""

import itertools
import math
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longfit.numerics import blockwise
from longfit.numerics.blockwise import (
    block_slices,
    dequantize_blockwise,
    nearest_codes,
    pack_nibbles,
    quantize_blockwise,
    unpack_nibbles,
)
from longfit.numerics.codebooks import codebook, dynamic_map

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def spell_out(values: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The rule of the format with no shortcut: count thresholds strictly below, one block after the other."""
    ascending, order = levels.sort(stable=True)
    thresholds = (ascending[:-1] + ascending[1:]) / 2
    codes, absmax = [], []
    for block in values.reshape(-1).float().split(block_size):
        absmax.append(block.abs().max())
        scaled = (block * (1.0 / absmax[-1].clamp(min=1e-38))).clamp(-1, 1)
        codes.append(order[(scaled[:, None] > thresholds).sum(1)].to(torch.uint8))
    return torch.cat(codes), torch.stack(absmax)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    numel=st.integers(1, 300),
    block_size=st.integers(1, 130),
    num_levels=st.sampled_from([2, 15, 16, 256]),
    exponent=st.integers(-40, 37),
    dtype=st.sampled_from(FLOATS),
)
def test_any_codebook_in_any_order(
    seed: int, numel: int, block_size: int, num_levels: int, exponent: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.rand(num_levels, generator=generator) * 2 - 1  # in no order
    values = torch.randn(numel, generator=generator, dtype=torch.float64) * 10.0**exponent
    values = values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    codes, absmax = quantize_blockwise(values, levels, block_size=block_size)
    expected_codes, expected_absmax = spell_out(values, levels, block_size)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(absmax, expected_absmax)
    scale = absmax.repeat_interleave(block_size)[:numel]
    for target in FLOATS:
        back = dequantize_blockwise(codes, absmax, levels, block_size=block_size, dtype=target)
        assert torch.equal(back, (levels[codes.int()] * scale).to(target))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_a_tie_goes_to_the_lower_level_and_a_level_to_itself(quant_type: str) -> None:
    levels = codebook(quant_type)
    ascending = levels.sort().values
    thresholds = (ascending[:-1] + ascending[1:]) / 2
    just_above = torch.nextafter(thresholds, torch.full_like(thresholds, 2.0))
    assert torch.equal(levels[nearest_codes(thresholds, levels).int()], ascending[:-1])
    assert torch.equal(levels[nearest_codes(just_above, levels).int()], ascending[1:])
    assert torch.equal(levels[nearest_codes(levels, levels).int()], levels)


def test_golden_codes() -> None:
    halves = torch.tensor([-1.0, -0.7, 0.0, -0.0, 0.04, 0.03, 0.5, 1.0]) * 2
    codes, absmax = quantize_blockwise(halves, codebook("nf4"), block_size=8)
    assert codes.tolist() == [0, 1, 7, 7, 8, 7, 12, 15]
    assert absmax.tolist() == [2.0]
    codes, _ = quantize_blockwise(halves, codebook("fp4"), block_size=8)
    # 0 takes the first of the two zeros; 0.03 and 0.04 are nearer to 1/192 than to 1/6; -0.7 to -2/3
    assert codes.tolist() == [11, 10, 0, 0, 1, 1, 5, 3]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("spread", ["normal", "log-normal"])
def test_8_bit_codes_are_the_nearest_ones(signed: bool, spread: str) -> None:
    values = torch.randn(10_000) if spread == "normal" else (torch.randn(10_000) * 4).exp()
    values = values if signed else values.abs()
    levels = dynamic_map(signed)
    codes, absmax = quantize_blockwise(values, levels, block_size=256)
    expected_codes, expected_absmax = spell_out(values, levels, 256)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_codes_agree_with_bitsandbytes_where_its_table_resolves_them(signed: bool) -> None:
    values = torch.randn(50_000) if signed else torch.rand(50_000)
    levels = dynamic_map(signed)
    codes, absmax = quantize_blockwise(values, levels, block_size=256)
    theirs, state = bitsandbytes.functional.quantize_blockwise(values, code=levels, blocksize=256)
    assert torch.equal(absmax, state.absmax)
    # On the CPU it rounds the scaled value to one of 65,536 places in [-1, 1] and looks the code up. A value further
    # than one place from every threshold must have the same code.
    scaled = values * absmax.reciprocal().repeat_interleave(256)[: values.numel()]
    thresholds = (levels[:-1] + levels[1:]) / 2
    resolved = (scaled[:, None] - thresholds).abs().amin(1) > 2 / 65_535
    assert resolved.float().mean() > 0.95
    assert torch.equal(codes[resolved], theirs[resolved])
    back = dequantize_blockwise(theirs, absmax, levels, block_size=256, dtype=torch.float32)
    assert torch.equal(back, bitsandbytes.functional.dequantize_blockwise(theirs, state))


def test_8_bit_error_is_below_the_published_limits() -> None:
    values = torch.randn(1 << 18)
    codes, absmax = quantize_blockwise(values, dynamic_map(signed=True), block_size=256)
    back = dequantize_blockwise(codes, absmax, dynamic_map(signed=True), block_size=256, dtype=torch.float32)
    error = (back - values).abs()
    assert error.mean() < 0.011
    assert (error / values.abs().clamp(min=1e-8)).mean() < 0.018


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_nan_or_infinity_loses_exactly_its_block(broken: float, dtype: torch.dtype) -> None:
    values, levels = torch.randn(200, dtype=dtype), codebook("nf4")
    codes, absmax = quantize_blockwise(values, levels, block_size=64)
    values[70] = broken
    after, absmax_after = quantize_blockwise(values, levels, block_size=64)
    back = dequantize_blockwise(after, absmax_after, levels, block_size=64, dtype=dtype)
    hit = torch.zeros(200, dtype=torch.bool)
    hit[64:128] = True
    assert back[hit].isnan().all()
    assert (after[hit] == 15).all()
    assert torch.equal(after[~hit], codes[~hit])
    assert torch.equal(absmax_after[[0, 2, 3]], absmax[[0, 2, 3]])


def test_fp64_beyond_fp32_counts_as_infinite() -> None:
    codes, absmax = quantize_blockwise(torch.tensor([1e300, 1.0], dtype=torch.float64), codebook("nf4"), block_size=1)
    assert absmax[0].isnan()
    assert absmax[1] == 1
    assert codes[1] == 15


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-39, 1.2e-38, torch.finfo(torch.float32).max])
def test_the_smallest_and_largest_absmax_decode_to_finite_values(largest: float) -> None:
    values = torch.tensor([largest, -largest, 0.0, largest / 2])
    codes, absmax = quantize_blockwise(values, codebook("nf4"), block_size=4)
    back = dequantize_blockwise(codes, absmax, codebook("nf4"), block_size=4, dtype=torch.float32)
    assert absmax[0] == values[0]
    assert back[2] == 0
    assert ((back - values).abs() <= largest).all()
    if largest == 0:
        assert codes.tolist() == [7, 7, 7, 7]


def test_strides_gradients_and_nothing() -> None:
    values, levels = torch.randn(24, 40), codebook("nf4")
    for view in (values.t(), values[:, ::3], values[3:, 5:]):
        for mine, theirs in zip(
            quantize_blockwise(view, levels, block_size=32),
            quantize_blockwise(view.contiguous(), levels, block_size=32),
            strict=True,
        ):
            assert torch.equal(mine, theirs)
    codes, absmax = quantize_blockwise(torch.nn.Parameter(values), levels, block_size=32)
    assert not absmax.requires_grad
    strided = codes.repeat_interleave(2)[::2]
    assert torch.equal(
        dequantize_blockwise(strided, absmax, levels, block_size=32, dtype=torch.float32),
        dequantize_blockwise(codes, absmax, levels, block_size=32, dtype=torch.float32),
    )
    codes, absmax = quantize_blockwise(torch.empty(0), levels, block_size=64)
    assert codes.shape == absmax.shape == (0,)
    assert dequantize_blockwise(codes, absmax, levels, block_size=64, dtype=torch.float16).shape == (0,)


class LargestFloat(TorchDispatchMode):
    """Remembers the element count of the largest new fp32 tensor."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32 and not func.is_view:
            self.numel = max(self.numel, result.numel())
        return result


def test_slices_bound_the_scratch_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, levels = torch.randn(10_007, dtype=torch.bfloat16), codebook("nf4")
    codes, absmax = quantize_blockwise(values, levels, block_size=96)
    back = dequantize_blockwise(codes, absmax, levels, block_size=96, dtype=torch.bfloat16)
    monkeypatch.setattr(blockwise, "SLICE_NUMEL", 1000)
    with LargestFloat() as largest:
        sliced_codes, sliced_absmax = quantize_blockwise(values, levels, block_size=96)
        sliced = dequantize_blockwise(sliced_codes, sliced_absmax, levels, block_size=96, dtype=torch.bfloat16)
    assert torch.equal(sliced_codes, codes)
    assert torch.equal(sliced_absmax, absmax)
    assert torch.equal(sliced, back)
    assert 0 < largest.numel <= 1000
    assert torch.equal(quantize_blockwise(values, levels, block_size=4096)[1], spell_out(values, levels, 4096)[1])


def test_slices_count_in_64_bits() -> None:
    numel = 2**32 + 70
    runs = list(block_slices(numel, 64))
    assert runs[0][0].start == 0
    assert all(before[0].stop == after[0].start for before, after in itertools.pairwise(runs))
    assert all(before[1].stop == after[1].start for before, after in itertools.pairwise(runs))
    assert runs[-1][0].stop == numel
    assert runs[-1][1].stop == 2**26 + 2


def test_nibbles_high_half_first() -> None:
    codes = torch.tensor([1, 2, 15, 0, 9], dtype=torch.uint8)
    assert pack_nibbles(codes[:4]).tolist() == [0x12, 0xF0]
    assert pack_nibbles(codes).tolist() == [0x12, 0xF0, 0x90]
    assert pack_nibbles(codes, fill=7).tolist() == [0x12, 0xF0, 0x97]
    assert pack_nibbles(codes[:0]).shape == (0,)


@given(st.lists(st.integers(0, 15), max_size=9))
def test_unpacking_undoes_packing(numbers: list[int]) -> None:
    codes = torch.tensor(numbers, dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), codes.numel()), codes)


def test_bad_arguments_say_what_is_allowed() -> None:
    values, levels = torch.ones(4), codebook("nf4")
    with pytest.raises(TypeError, match=r"got torch.int8; allowed: float16"):
        quantize_blockwise(torch.ones(4, dtype=torch.int8), levels, block_size=2)
    with pytest.raises(ValueError, match="block_size: got 0; allowed: an int of at least 1"):
        quantize_blockwise(values, levels, block_size=0)
    for wrong in (levels.double(), levels.view(4, 4), torch.zeros(257), torch.zeros(1)):
        with pytest.raises(ValueError, match=r"codebook: got .*allowed: float32 \[2\] to \[256\]"):
            quantize_blockwise(values, wrong, block_size=2)
    with pytest.raises(ValueError, match="codebook: holds NaN"):
        quantize_blockwise(values, torch.tensor([0.0, math.nan]), block_size=2)
    codes, absmax = quantize_blockwise(values, levels, block_size=2)
    for wrong in (absmax.double(), absmax[:1], absmax.view(2, 1)):
        with pytest.raises(ValueError, match=r"need float32 \[2\]; pass the absmax and the block_size"):
            dequantize_blockwise(codes, wrong, levels, block_size=2, dtype=torch.float32)
    for wrong in (codes, codes[:2].int(), codes[:2].view(2, 1)):
        with pytest.raises(ValueError, match=r"packed: got .*3 codes need uint8 \[2\]"):
            unpack_nibbles(wrong, 3)
