"""The Triton kernels for 8-bit values have the bits of the reference: interpreted here, compiled where a card is."""

import pytest
import torch
from tests.kernels.same_bits import assert_same
from torch import Tensor

from longfit.numerics import blockwise
from longfit.numerics.codebooks import codebook, dynamic_map

pytest.importorskip("triton", reason="the package triton is missing; it comes with the dev extra on Linux")

from longfit.kernels.triton import blockwise_8bit as triton_8bit

pytestmark = pytest.mark.usefixtures("poisoned")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def both_ways(values: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    mine = triton_8bit.quantize_8bit(values, levels, block_size=block_size)
    for a, b in zip(mine, blockwise.quantize_blockwise(values, levels, block_size=block_size), strict=True):
        assert_same(a, b)
    return mine


@pytest.mark.parametrize("block_size", [1, 100, 256, 1025, 5000])
@pytest.mark.parametrize("numel", [0, 1, 257, 6007])
def test_any_length_and_block(triton_device: str, block_size: int, numel: int) -> None:
    levels = dynamic_map(signed=True, device=triton_device)
    codes, absmax = both_ways(torch.randn(numel, device=triton_device), levels, block_size)
    for dtype in FLOATS:
        options = {"block_size": block_size, "dtype": dtype}
        mine = triton_8bit.dequantize_8bit(codes, absmax, levels, **options)
        assert_same(mine, blockwise.dequantize_blockwise(codes, absmax, levels, **options))


@pytest.mark.parametrize("signed", [True, False])
def test_every_threshold_and_its_neighbours(triton_device: str, signed: bool) -> None:
    levels = dynamic_map(signed)
    middle = (levels[:-1] + levels[1:]) / 2
    values = torch.cat([middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0)), levels])
    blocks = torch.ones(-(-values.numel() // 63), 64)  # absmax 1: values are scaled by exactly 1
    padded = torch.zeros(blocks.shape[0] * 63)
    padded[: values.numel()] = values
    blocks[:, 1:] = padded.view(-1, 63)
    both_ways(blocks.to(triton_device), levels.to(triton_device), 64)


@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_and_broken_blocks_of_any_dtype(triton_device: str, dtype: torch.dtype) -> None:
    values = torch.randn(7, 100)
    values[1], values[5] = 0, -0.0
    values[2, 0], values[3, 99], values[4, 50] = float("nan"), float("inf"), float("-inf")
    both_ways(values.to(triton_device, dtype), dynamic_map(signed=True, device=triton_device), 100)


def test_codebooks_of_other_sizes_and_orders(triton_device: str) -> None:
    values = torch.randn(1000, device=triton_device)
    values[70] = float("nan")
    fp8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / 448
    for levels in (codebook("fp4"), fp8[fp8.isfinite()], torch.tensor([3.0, -2.0]), torch.tensor([0.5, -1.0, 1.5])):
        both_ways(values, levels.to(triton_device), 64)
