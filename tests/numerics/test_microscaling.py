"""MXFP4 and NVFP4: every value against every level, scales against torch's own 8-bit floats, corners."""

import pytest
import torch

from longfit.numerics.microscaling import (
    E2M1,
    dequantize_mxfp4,
    dequantize_mxfp4_experts,
    dequantize_nvfp4,
    e2m1_codes,
    quantize_mxfp4,
    quantize_nvfp4,
)


def round_trip(name, values):
    if name == "mxfp4":
        return dequantize_mxfp4(*quantize_mxfp4(values), dtype=torch.float32).view(values.shape)
    return dequantize_nvfp4(*quantize_nvfp4(values), dtype=torch.float32).view(values.shape)


def test_elements_are_nearest_with_ties_to_even():
    levels = torch.tensor(E2M1)
    values = torch.cat([torch.randn(4000) * 3, levels, (levels[:-1] + levels[1:]) / 2, torch.tensor([7.0, 1e3])])
    values = torch.cat([values, -values])
    codes = e2m1_codes(values)
    for value, code in zip(values.tolist(), codes.tolist(), strict=True):
        distance = [abs(abs(value) - level) for level in E2M1]
        nearest = [index for index, d in enumerate(distance) if d == min(distance)]
        expected = next(index for index in nearest if len(nearest) == 1 or index % 2 == 0)
        assert code == expected + 8 * (torch.tensor(value).signbit().item())


@pytest.mark.parametrize("numel", [1, 31, 32, 33, 4000])
def test_mxfp4_scales_are_the_specification_s(numel):
    values = torch.randn(numel) * torch.logspace(-20, 20, numel)
    codes, scales = quantize_mxfp4(values)
    assert codes.shape == (numel,)
    for block, scale in zip(values.split(32), scales.float(), strict=True):
        exponent = torch.floor(torch.log2(block.abs().max().double())) - 2
        assert scale.double() == 2.0**exponent
    # Half the widest step below 4, a quarter beyond; a value up to 8 is cut to 6: 2 steps of the scale at most.
    error = (dequantize_mxfp4(codes, scales, dtype=torch.float32) - values).abs()
    assert torch.all(error <= 2 * scales.float().repeat_interleave(32)[:numel])


@pytest.mark.parametrize("numel", [1, 15, 16, 17, 4000])
def test_nvfp4_scales_are_e4m3_of_the_block_over_the_tensor(numel):
    values = torch.randn(numel)
    codes, scales, tensor_scale = quantize_nvfp4(values)
    assert scales.dtype == torch.float8_e4m3fn
    assert float(tensor_scale) == pytest.approx(float(values.abs().max()) / 6 / 448)
    assert float(scales.float().max()) == pytest.approx(448, rel=2**-4)
    scale = (scales.float() * tensor_scale).repeat_interleave(16)[:numel]
    # One step beyond 4 is 2; the block's scale is rounded by 2^-4 of itself, which may cut 6 * 2^-4.
    error = (dequantize_nvfp4(codes, scales, tensor_scale, dtype=torch.float32) - values).abs()
    assert torch.all(error <= (1 + 6 * 2**-4) * scale)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_zeros_signs_and_what_the_format_holds_come_back(name):
    assert torch.equal(round_trip(name, torch.zeros(40)), torch.zeros(40))
    held = torch.tensor([*E2M1, *(-level for level in E2M1)]) * 4.0
    assert torch.equal(round_trip(name, held), held)
    assert round_trip(name, torch.empty(0)).shape == (0,)


def test_what_is_not_finite_shows():
    values = torch.randn(100)
    values[70] = float("inf")
    decoded = round_trip("mxfp4", values)
    assert decoded[64:96].isnan().all()
    assert decoded[:64].isfinite().all()
    assert round_trip("nvfp4", values).isnan().all()


def test_the_order_of_errors_on_normal_weights():
    weight = torch.randn(256, 512)
    mx, nv = (float((round_trip(name, weight) - weight).norm() / weight.norm()) for name in ("mxfp4", "nvfp4"))
    assert nv < mx  # smaller blocks and finer scales


def test_scales_of_another_tensor_are_refused():
    codes, scales = quantize_mxfp4(torch.randn(64))
    with pytest.raises(ValueError, match="need \\[3\\]"):
        dequantize_mxfp4(torch.cat([codes, codes[:1]]), scales, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (3, 64, 2)])
def test_experts_of_a_checkpoint_are_those_of_transformers(shape):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, shape, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(dequantize_mxfp4_experts(blocks, scales), theirs)
