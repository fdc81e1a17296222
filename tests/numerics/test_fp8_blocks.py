"""FP8 blocks: transformers' own de-quantiser where it takes the shape, each number by its block where it does not."""

import pytest
import torch
from tests.numerics.test_packed_integers import golden
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from longfit.numerics.fp8_blocks import dequantize_fp8_blocks


def random_fp8(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_blocks_are_those_of_transformers(dtype: torch.dtype) -> None:
    weight, scale = random_fp8(256, 384), torch.rand(2, 3).to(dtype)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.float32)
    assert torch.equal(dequantize_fp8_blocks(weight, scale, block=(128, 128)), theirs)


@pytest.mark.parametrize("shape", [(1, 1), (5, 4), (130, 257), (4, 129)])
def test_the_last_blocks_may_be_short(shape: tuple[int, int]) -> None:
    """As DeepSeek-V3's ``weight_dequant`` masks them (its kv_a_proj_with_mqa has 576 rows)."""
    rows, columns = shape
    weight, scale = random_fp8(*shape), torch.rand(-(-rows // 4), -(-columns // 128))
    got = dequantize_fp8_blocks(weight, scale, block=(4, 128))
    for row in range(rows):
        for column in range(columns):
            assert got[row, column] == weight[row, column].float() * scale[row // 4, column // 128]


def test_stacked_experts_have_their_blocks_each() -> None:
    weight, scale = random_fp8(3, 130, 64), torch.rand(3, 2, 1)
    got = dequantize_fp8_blocks(weight, scale, block=(128, 128))
    for number in range(3):
        assert torch.equal(got[number], dequantize_fp8_blocks(weight[number], scale[number], block=(128, 128)))


@pytest.mark.parametrize("name", ["ctfp8channel", "ctfp8tensor", "ctfp8block"])
def test_float_quantized_is_read_as_compressed_tensors_reads_it(name: str) -> None:
    parts = golden(name)
    block = (32, 32) if name == "ctfp8block" else None
    assert torch.equal(
        dequantize_fp8_blocks(parts["weight"], parts["weight_scale"], block=block), parts["decompressed"]
    )


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scales \[2, 1\] of blocks of 128 x 128: must be \[1, 1\]"):
        dequantize_fp8_blocks(random_fp8(128, 128), torch.rand(2, 1), block=(128, 128))
    with pytest.raises(ValueError, match="one number, or one a row"):
        dequantize_fp8_blocks(random_fp8(4, 4), torch.rand(1, 4), block=None)
