"""Codebooks: the bytes that files hold, how NF4 is made, and the rivals."""

import hashlib
import math

import bitsandbytes.functional
import pytest
import torch
from torch import Tensor

from longfit.numerics.codebooks import codebook, dynamic_map, normal_float_4


def sha256(levels: Tensor) -> str:
    return hashlib.sha256(levels.numpy().astype("<f4").tobytes()).hexdigest()


def test_golden_bytes() -> None:
    assert sha256(codebook("nf4")) == "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
    assert sha256(dynamic_map(signed=True)) == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert sha256(dynamic_map(signed=False)) == "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_levels_are_those_of_bitsandbytes(quant_type: str) -> None:
    theirs = bitsandbytes.functional.get_4bit_type(quant_type, device="cpu")
    assert torch.equal(codebook(quant_type).view(torch.int32), theirs.view(torch.int32))  # bits: also the sign of 0


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_maps_are_those_of_bitsandbytes(signed: bool) -> None:
    assert torch.equal(dynamic_map(signed), bitsandbytes.functional.create_dynamic_map(signed=signed))
    assert dynamic_map(signed).unique().numel() == 256


def test_nf4_is_made_of_normal_quantiles() -> None:
    made, literal = normal_float_4(), codebook("nf4").double()
    assert (made - literal).abs().max() < 1e-7
    assert made[7] == 0
    assert made[0] == -1
    assert made[15] == 1
    assert (made < 0).sum() == 7  # one level less than on the positive side
    # Undo the scaling with the largest quantile: each half is evenly spaced in probability, and ends at the same two.
    largest = torch.special.ndtri(torch.tensor(0.9677083, dtype=torch.float64))
    for half, steps in ((made[7:], 8), (-made[:8].flip(0), 7)):
        steps_in_probability = torch.special.ndtr(half * largest).diff()
        # 1e-7: the probabilities were rounded to fp32, half an ulp of at most 2^-25 each
        assert (steps_in_probability - 0.4677083 / steps).abs().max() < 1e-7


def test_fp4_is_sign_exponent_mantissa_over_twelve() -> None:
    levels = codebook("fp4")
    assert (levels[:8] * 12).tolist() == [0, 0.0625, 8, 12, 4, 6, 2, 3]
    assert torch.equal(levels[8:], -levels[:8])


def test_int4_is_the_twos_complement_nibble_over_seven() -> None:
    nibbles = torch.arange(16, dtype=torch.int8)
    signed = (nibbles << 4) >> 4  # arithmetic shift spreads the sign bit
    assert torch.equal(codebook("int4"), (signed.double() / 7).float())


def test_surroundings_change_nothing_and_callers_cannot_either() -> None:
    before = {"nf4": codebook("nf4"), "map": dynamic_map(signed=True)}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        inside = {"nf4": codebook("nf4"), "map": dynamic_map(signed=True)}
    for name, levels in inside.items():
        assert levels.dtype == torch.float32
        assert torch.equal(levels, before[name])
        levels.fill_(math.nan)
    assert torch.equal(codebook("nf4"), before["nf4"])
    assert torch.equal(dynamic_map(signed=True), before["map"])


def test_an_unknown_type_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="got 'nf5'; allowed: nf4, fp4, int4"):
        codebook("nf5")
