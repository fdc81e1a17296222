"""Quantile quantisation: equally likely bins on any distribution, and use as a codebook."""

import math

import pytest
import torch

from longfit.numerics import quantile
from longfit.numerics.blockwise import dequantize_blockwise, quantize_blockwise
from longfit.numerics.codebooks import codebook
from longfit.numerics.quantile import block_scaled_sample, quantile_codebook, quantile_edges

NUMEL = 64 * 1024


@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("num_levels", [4, 16, 64])
def test_every_bin_is_equally_likely(power: int, num_levels: int) -> None:
    values = torch.randn(NUMEL, dtype=torch.float64) ** power
    edges = quantile_edges(values, num_levels=num_levels)
    scaled = block_scaled_sample(values, block_size=64)
    used = torch.bincount(torch.bucketize(scaled, edges[1:-1]), minlength=num_levels)
    # An inner edge lies between two neighbours of the sorted sample, so a bin may gain or lose one value at either end.
    # -1.0 and 1.0 occur in half the blocks each, 512 times: they fit in an outer bin of at least 1,024.
    assert (used - NUMEL // num_levels).abs().max() <= 2
    assert edges[0] == scaled.min()
    assert edges[-1] == scaled.max()


def test_nearest_levels_spread_values_better_than_a_uniform_grid() -> None:
    values = torch.randn(NUMEL)
    used = {}
    for name, levels in {"quantile": quantile_codebook(quantile_edges(values)), "int4": codebook("int4")}.items():
        codes, _ = quantize_blockwise(values, levels, block_size=64)
        share = torch.bincount(codes.int(), minlength=16) / NUMEL
        used[name] = -(share[share > 0] * share[share > 0].log2()).sum().item()
    assert used["quantile"] > 3.98  # of 4 bits; the outer bins hold a quarter less, which costs 0.015 bit
    assert used["int4"] < 3.6


def test_estimated_levels_reconstruct_skewed_values_better_than_nf4() -> None:
    values = torch.rand(NUMEL)  # nothing is negative: NF4 wastes seven levels
    error = {}
    for name, levels in {"quantile": quantile_codebook(quantile_edges(values)), "nf4": codebook("nf4")}.items():
        codes, absmax = quantize_blockwise(values, levels, block_size=64)
        back = dequantize_blockwise(codes, absmax, levels, block_size=64, dtype=torch.float32)
        error[name] = (back - values).abs().mean().item()
    assert (
        error["quantile"] < error["nf4"] / 1.5
    )  # 16 levels instead of 9: 1/64 against 1/32 on average, absmax nearly 1


def test_a_large_tensor_is_sampled_in_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(40 * 64 + 7)
    monkeypatch.setattr(quantile, "SAMPLE_NUMEL", 10 * 64)
    sample = block_scaled_sample(values, block_size=64)
    every_fifth = values[: 40 * 64].view(40, 64)[::5].reshape(-1)  # ceil(2567 / 640) = 5
    assert torch.equal(sample, block_scaled_sample(every_fifth, block_size=64))
    assert sample.numel() == 8 * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_few_values_and_any_float_type(dtype: torch.dtype) -> None:
    edges = quantile_edges(torch.tensor([[1.0, -0.5], [0.25, 0.0]], dtype=dtype), num_levels=2)
    assert edges.tolist() == [-0.5, 0.125, 1.0]
    assert quantile_codebook(edges).tolist() == [-0.1875, 0.5625]
    assert quantile_edges(torch.zeros(3, dtype=dtype)).tolist() == [0.0] * 17


def test_bad_arguments_say_what_is_allowed() -> None:
    for values in (torch.empty(0), torch.tensor([1.0, math.nan]), torch.tensor([math.inf, 1.0])):
        with pytest.raises(ValueError, match="need finite values"):
            quantile_edges(values)
    with pytest.raises(ValueError, match="num_levels: got 257; allowed: 2 to 256"):
        quantile_edges(torch.ones(3), num_levels=257)
