"""4-bit weights: parity with bitsandbytes to the last bit, golden bytes, size, published errors, awkward weights."""

import math

import bitsandbytes.functional
import pytest
import torch
from torch import Tensor

from longfit.numerics import blockwise
from longfit.numerics.codebooks import codebook
from longfit.numerics.quant_state import BLOCK_SIZES, QuantState, dequantize_4bit, quantize_4bit

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def spell_out_decoding(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """The decoding rule, one weight after the other by its index."""
    index = torch.arange(state.numel)
    codes = torch.where(index % 2 == 0, packed[index // 2] >> 4, packed[index // 2] & 15)
    scaled = codebook(state.quant_type)[codes.int()] * state.block_absmax()[index // state.block_size]
    return scaled.to(dtype).view(state.shape)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_bytes_constants_and_decoded_values_are_those_of_bitsandbytes(quant_type: str, dtype: torch.dtype) -> None:
    for block_size in (32, 64, 128, 1024):
        weight = (torch.randn(48, 1024) * 0.02).to(dtype)
        theirs, their_state = bitsandbytes.functional.quantize_4bit(weight, blocksize=block_size, quant_type=quant_type)
        packed, state = quantize_4bit(weight, quant_type=quant_type, block_size=block_size, double_quant=False)
        assert torch.equal(packed, theirs.view(-1))
        assert torch.equal(state.absmax, their_state.absmax)
        for target in HALF_AND_SINGLE:  # bitsandbytes decodes to the dtype its state names
            their_state.dtype = target
            decoded = bitsandbytes.functional.dequantize_4bit(theirs, their_state)
            assert torch.equal(dequantize_4bit(packed, state, target), decoded)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_double_quantised_weights_decode_as_in_bitsandbytes(quant_type: str) -> None:
    weight = (torch.randn(96, 512) * 0.02).bfloat16()
    theirs, their_state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, quant_type=quant_type, compress_statistics=True
    )
    packed, state = quantize_4bit(weight, quant_type=quant_type)
    assert torch.equal(packed, theirs.view(-1))
    assert torch.equal(state.absmax.absmax, their_state.state2.absmax)
    assert torch.equal(state.absmax.offset, their_state.offset)
    their_state.absmax = state.absmax.codes  # exact nearest codes, where its CPU table is coarser
    assert torch.equal(dequantize_4bit(packed, state), bitsandbytes.functional.dequantize_4bit(theirs, their_state))


def test_golden_bytes() -> None:
    weight = torch.tensor([*codebook("nf4").tolist()] * 4) * 0.5
    packed, state = quantize_4bit(weight, double_quant=False)
    assert bytes(packed.tolist()).hex() == "0123456789abcdef" * 4
    assert state.absmax.tolist() == [0.5]
    packed, state = quantize_4bit(torch.tensor([[1.0], [-2.0], [0.0]]), double_quant=False)  # odd: filled up with a 0
    assert bytes(packed.tolist()).hex() == "c077"  # 0.5 lies between 0.4407 (code 12) and 0.5626, 0.5017 the threshold
    assert dequantize_4bit(packed, state).flatten().tolist() == [2 * codebook("nf4")[12].item(), -2.0, 0.0]
    packed, _ = quantize_4bit(torch.tensor([1.0, 0.0, -0.25]), quant_type="fp4")
    assert bytes(packed.tolist()).hex() == "30f0"
    packed, _ = quantize_4bit(torch.tensor([1.0, 0.0, -1.0]), quant_type="int4")
    assert bytes(packed.tolist()).hex() == "7090"


@pytest.mark.parametrize("in_features", [64, 72, 80, 96, 160, 2112])
@pytest.mark.parametrize("block_size", [64, 128])
def test_blocks_run_across_rows(in_features: int, block_size: int) -> None:
    weight = torch.randn(5, in_features)
    for double_quant in (False, True):
        packed, state = quantize_4bit(weight, block_size=block_size, double_quant=double_quant)
        for dtype in HALF_AND_SINGLE:
            assert torch.equal(dequantize_4bit(packed, state, dtype), spell_out_decoding(packed, state, dtype))
        flat, _ = quantize_4bit(weight.view(-1), block_size=block_size)
        assert torch.equal(packed, flat)


@pytest.mark.parametrize("shape", [(), (1,), (63,), (65,), (7, 33), (3, 5, 21), (0,), (4, 0)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_any_shape(shape: tuple[int, ...], quant_type: str, double_quant: bool) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    packed, state = quantize_4bit(weight, quant_type=quant_type, double_quant=double_quant)
    assert packed.shape == ((weight.numel() + 1) // 2,)
    assert state.dtype == torch.float64
    for dtype in (None, torch.bfloat16):
        back = dequantize_4bit(packed, state, dtype)
        assert back.shape == shape
        assert back.dtype == (dtype or torch.float64)
        assert torch.equal(back, spell_out_decoding(packed, state, back.dtype))


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(101, 77)
    packed, state = quantize_4bit(weight)
    back = dequantize_4bit(packed, state)
    monkeypatch.setattr(blockwise, "SLICE_NUMEL", 1000)  # several slices, the last with an odd count
    sliced, sliced_state = quantize_4bit(weight)
    assert torch.equal(sliced, packed)
    assert torch.equal(sliced_state.block_absmax(), state.block_absmax())
    assert torch.equal(dequantize_4bit(sliced, sliced_state), back)


# Mean |error| of NF4 on N(0, 1), published with bitsandbytes' tests, by block size: absolute, relative.
NF4_ERRORS = {
    32: (0.067746, 0.1897),
    64: (0.072798, 0.2033),
    128: (0.076831, 0.2152),
    256: (0.080337, 0.2261),
    512: (0.083547, 0.2361),
    1024: (0.086610, 0.2454),
    2048: (0.089592, 0.2542),
    4096: (0.092547, 0.2625),
}
FP4_ERRORS = {64: (0.096543, 0.2601)}


@pytest.mark.parametrize(
    ("quant_type", "block_size", "absolute", "relative"),
    [("nf4", size, *errors) for size, errors in NF4_ERRORS.items()]
    + [("fp4", size, *errors) for size, errors in FP4_ERRORS.items()],
)
def test_error_is_the_published_one(quant_type: str, block_size: int, absolute: float, relative: float) -> None:
    weight = torch.randn(1024, 1024)
    packed, state = quantize_4bit(weight, quant_type=quant_type, block_size=block_size, double_quant=False)
    error = (dequantize_4bit(packed, state) - weight).abs()
    for found, published, digit in ((error, absolute, 1e-6), (error / (weight.abs() + 1e-8), relative, 1e-4)):
        per_block = found.view(-1, block_size).mean(1).double()  # independent of each other
        standard_error = per_block.std() / math.sqrt(per_block.numel())
        # The published mean is of at least one run of this size, so the difference has at most sqrt(2) of our standard
        # error: five of those, and one unit of the last digit printed.
        assert (per_block.mean() - published).abs() < 5 * math.sqrt(2) * standard_error + digit


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_blocks_of_zeros_stay_zero(quant_type: str, double_quant: bool) -> None:
    weight = torch.randn(8, 256)
    weight[2], weight[5, 64:128] = 0, 0
    packed, state = quantize_4bit(weight, quant_type=quant_type, double_quant=double_quant)
    back = dequantize_4bit(packed, state)
    assert (back[2] == 0).all()
    assert (back[5, 64:128] == 0).all()
    assert (state.block_absmax()[8:12] == 0).all() != double_quant  # the constants of row 2 do not stay 0 in 8 bits
    if quant_type == "nf4":
        assert (packed.view(8, 128)[2] == 0x77).all()
    nothing = torch.zeros(3, 100)
    assert torch.equal(dequantize_4bit(*quantize_4bit(nothing, quant_type=quant_type)), nothing)


def test_a_nan_loses_its_block_or_with_double_quantisation_the_weight() -> None:
    weight = torch.randn(4, 128)
    weight[1, 3] = math.nan
    back = dequantize_4bit(*quantize_4bit(weight, double_quant=False))
    assert back.isnan().nonzero().tolist() == [[1, column] for column in range(64)]
    assert dequantize_4bit(*quantize_4bit(weight)).isnan().all()  # all constants share one mean


def test_bits_per_parameter_are_the_papers() -> None:
    weight = torch.randn(4096, 4096, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, double_quant=False)
    assert state.bits_per_param == 4.5
    assert state.nbytes == packed.nbytes + state.absmax.nbytes
    packed, state = quantize_4bit(weight)
    assert state.bits_per_param == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=2e-6)  # the offset: 32 / 2^24 bit
    assert round(state.bits_per_param, 3) == 4.127
    assert state.nbytes == packed.nbytes + state.absmax.nbytes


def test_strides_gradients_and_default_dtype() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 96))
    packed, state = quantize_4bit(weight.t())
    torch.set_default_dtype(torch.bfloat16)
    again, state_again = quantize_4bit(weight.detach().t().contiguous())
    assert torch.equal(packed, again)
    assert torch.equal(state.block_absmax(), state_again.block_absmax())
    back = dequantize_4bit(packed, state)
    assert back.dtype == torch.float32
    assert not back.requires_grad
    moved = state.to("cpu")
    assert torch.equal(dequantize_4bit(packed, moved), back)


def test_bad_arguments_say_what_is_allowed() -> None:
    weight = torch.randn(4, 64)
    with pytest.raises(TypeError, match=r"got torch.uint8; allowed: float16"):
        quantize_4bit(weight.byte())
    with pytest.raises(ValueError, match="quant_type: got 'nf3'; allowed: nf4, fp4, int4"):
        quantize_4bit(weight, quant_type="nf3")
    for wrong in (0, 16, 33, 96, 8192):
        assert wrong not in BLOCK_SIZES
        with pytest.raises(ValueError, match=rf"^block_size: got {wrong}; allowed: 32, .*4096; try block_size=64"):
            quantize_4bit(weight, block_size=wrong)
        with pytest.raises(ValueError, match=rf"^absmax_block_size: got {wrong}; .*try absmax_block_size=256"):
            quantize_4bit(weight, absmax_block_size=wrong)
    packed, state = quantize_4bit(weight)
    for wrong in (packed[:-1], packed.view(-1, 1), packed.view(torch.bfloat16)):
        with pytest.raises(ValueError, match=r"needs uint8 \[128\]; view stored bf16 or fp32 as uint8 and flatten it"):
            dequantize_4bit(wrong, state)
    with pytest.raises(ValueError, match=r"absmax: got \[4\] codes; shape \[4, 128\] in blocks of 64 needs \[8\]"):
        QuantState("nf4", 64, (4, 128), torch.float32, state.absmax)
    with pytest.raises(ValueError, match=r"absmax: got torch.bfloat16 \[4\]"):
        QuantState("nf4", 64, (4, 64), torch.float32, state.block_absmax().bfloat16())
