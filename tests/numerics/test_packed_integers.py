"""Packed integers: what GPTQ's, AWQ's and compressed-tensors' own tools wrote and read, and bits counted one by one.

``tests/data/stored_formats.safetensors`` holds what these tools made of random weights, and what they read from it:
AutoGPTQ's ``qlinear_cuda.QuantLinear.pack`` and its product with the identity (commit 9f7d370), AutoAWQ's
``WQLinear_GEMM.from_linear`` and ``dequantize_gemm`` (88e4c76), compressed-tensors 0.20.1 ``compress`` and
``decompress``, all with scales in float32 so that nothing but the integers is compared.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longfit.numerics.packed_integers import (
    dequantize_awq,
    dequantize_gptq,
    dequantize_pack_quantized,
    runs_of,
    unpack_integers,
)

GOLDEN = Path(__file__).parents[1] / "data" / "stored_formats.safetensors"


def golden(name: str) -> dict[str, torch.Tensor]:
    """The tensors that a tool wrote, and ``weight`` or ``decompressed``, which it read from them."""
    tensors = load_file(GOLDEN)
    return {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_integers_lie_bit_behind_bit(bits: int, count: int) -> None:
    values = torch.randint(0, 1 << bits, (3, count)).tolist()
    rows = []
    for row in values:
        stream = sum(value << (bits * index) for index, value in enumerate(row))
        words = [stream >> (32 * index) & 0xFFFFFFFF for index in range(-(-count * bits // 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    packed = torch.tensor(rows, dtype=torch.int32)
    assert unpack_integers(packed, bits=bits, count=count).tolist() == values


def test_too_few_words_are_refused() -> None:
    with pytest.raises(ValueError, match="33 integers of 4 bits need 5 words, got 4"):
        unpack_integers(torch.zeros(2, 4, dtype=torch.int32), bits=4, count=33)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_read_as_autogptq_reads_it(bits: int) -> None:
    parts = golden(f"gptq{bits}")
    weight = dequantize_gptq(parts["qweight"], parts["qzeros"], parts["scales"], parts["g_idx"], bits=bits)
    assert torch.equal(weight, parts["weight"])
    assert parts["g_idx"].tolist() != sorted(parts["g_idx"].tolist())  # act-order: groups are no runs


def test_version_2_of_gptq_stores_zeros_as_they_are() -> None:
    parts = golden("gptq4")
    one_more = parts["qzeros"] + 0x11111111  # no nibble is 15: nothing is carried
    arguments = (parts["scales"], parts["g_idx"])
    weight = dequantize_gptq(parts["qweight"], one_more, *arguments, bits=4, zeros_from_one=False)
    assert torch.equal(weight, parts["weight"])


def test_a_zero_that_tools_read_differently_is_refused() -> None:
    parts = golden("gptq4")
    with pytest.raises(ValueError, match="whether it is 0 or 16"):
        dequantize_gptq(parts["qweight"], parts["qzeros"] | 0xF, parts["scales"], parts["g_idx"], bits=4)


def test_awq_is_read_as_autoawq_reads_it() -> None:
    parts = golden("awq")
    weight = dequantize_awq(parts["qweight"], parts["qzeros"], parts["scales"], runs_of(32, 64))
    assert torch.equal(weight, parts["weight"])


@pytest.mark.parametrize(
    ("name", "bits", "group_size"),
    [("ct4group", 4, 32), ("ct4asym", 4, 32), ("ct4channel", 4, -1), ("ct8channel", 8, -1)],
)
def test_pack_quantized_is_read_as_compressed_tensors_reads_it(name: str, bits: int, group_size: int) -> None:
    parts = golden(name)
    groups = runs_of(group_size, int(parts["weight_shape"][1]))
    zeros = parts.get("weight_zero_point")
    weight = dequantize_pack_quantized(parts["weight_packed"], parts["weight_scale"], zeros, groups, bits=bits)
    assert torch.equal(weight, parts["decompressed"])
