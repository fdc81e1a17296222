"""Files of bitsandbytes: the same bytes out, the same values in, under any default dtype."""

import json

import bitsandbytes.functional
import pytest
import torch
from torch import Tensor

from longfit.numerics.bitsandbytes_format import from_bitsandbytes, to_bitsandbytes
from longfit.numerics.double_quant import DoubleQuant
from longfit.numerics.quant_state import QuantState, dequantize_4bit, quantize_4bit


def written_by_bitsandbytes(
    weight: Tensor, quant_type: str, double_quant: bool, storage: torch.dtype = torch.uint8
) -> tuple[dict[str, Tensor], Tensor]:
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, quant_type=quant_type, compress_statistics=double_quant, quant_storage=storage
    )
    decoded = bitsandbytes.functional.dequantize_4bit(packed, state)
    return {"weight": packed, **state.as_dict(packed=True)}, decoded


def assert_same_files(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(mine) == list(theirs)
    for key in mine:
        assert mine[key].dtype == theirs[key].dtype, key
        assert torch.equal(mine[key], theirs[key]), key


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reading_and_writing_again_gives_the_same_bytes_and_values(
    quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    weight = (torch.randn(33, 128) * 0.02).to(dtype)
    theirs, decoded = written_by_bitsandbytes(weight, quant_type, double_quant)
    for default in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        packed, state = from_bitsandbytes(theirs)
        assert torch.equal(dequantize_4bit(packed, state), decoded)
        assert_same_files(to_bitsandbytes(packed, state), theirs)


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_reads_what_is_written(double_quant: bool) -> None:
    packed, state = quantize_4bit(torch.randn(48, 192, dtype=torch.bfloat16), double_quant=double_quant)
    tensors = to_bitsandbytes(packed, state)
    stored = tensors.pop("weight")
    theirs = bitsandbytes.functional.QuantState.from_dict(tensors, device=torch.device("cpu"))
    assert torch.equal(bitsandbytes.functional.dequantize_4bit(stored, theirs), dequantize_4bit(packed, state))


def test_the_offset_is_exact_under_a_bf16_default_dtype() -> None:
    packed, state = quantize_4bit(torch.randn(8, 64) * 1.1)
    offset = torch.tensor(2.5806)  # bf16 has 2.5781 next to it
    double = DoubleQuant(state.absmax.codes, state.absmax.absmax, offset)
    tensors = to_bitsandbytes(packed, QuantState("nf4", 64, state.shape, state.dtype, double))
    torch.set_default_dtype(torch.bfloat16)
    _, back = from_bitsandbytes(tensors)
    assert back.absmax.offset.dtype == torch.float32
    assert back.absmax.offset.item() == offset.item()


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_stored_as_floats_are_bytes(storage: torch.dtype) -> None:
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    as_bytes, decoded = written_by_bitsandbytes(weight, "nf4", True)
    as_floats, _ = written_by_bitsandbytes(weight, "nf4", True, storage)
    assert as_floats["weight"].dtype == storage
    packed, state = from_bitsandbytes(as_floats)
    assert torch.equal(packed, as_bytes["weight"].view(-1))
    assert torch.equal(dequantize_4bit(packed, state), decoded)
    older = {**as_bytes, "weight": as_bytes["weight"].t()}  # [1, n / 2]
    assert torch.equal(from_bitsandbytes(older)[0], packed)


def test_golden_text() -> None:
    packed, state = quantize_4bit(torch.full((2, 64), 0.5, dtype=torch.bfloat16))
    tensors = to_bitsandbytes(packed, state)
    assert list(tensors) == [
        "weight",
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state.bitsandbytes__nf4",
    ]
    assert tensors["weight"].shape == (64, 1)
    assert bytes(tensors["quant_state.bitsandbytes__nf4"].tolist()).decode() == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64], "nested_blocksize": 256, '
        '"nested_dtype": "float32", "nested_offset": 0.5}'
    )


def test_what_bitsandbytes_cannot_read_is_not_written() -> None:
    weight = torch.randn(4, 64)
    with pytest.raises(ValueError, match="quant_type: got 'int4'; bitsandbytes files hold nf4 or fp4"):
        to_bitsandbytes(*quantize_4bit(weight, quant_type="int4"))
    with pytest.raises(ValueError, match=r"dtype: got torch.float64; bitsandbytes files hold float16, bfloat16"):
        to_bitsandbytes(*quantize_4bit(weight.double()))
    with pytest.raises(ValueError, match=r"got constants in blocks of 128; .*absmax_block_size=256"):
        to_bitsandbytes(*quantize_4bit(weight, absmax_block_size=128))


def test_damaged_files_are_refused() -> None:
    whole = to_bitsandbytes(*quantize_4bit(torch.randn(4, 64)))
    text_key = "quant_state.bitsandbytes__nf4"
    for missing in ("absmax", "quant_map", "nested_quant_map", "weight"):
        with pytest.raises(ValueError, match="needs exactly the tensors"):
            from_bitsandbytes({key: value for key, value in whole.items() if key != missing})
    with pytest.raises(ValueError, match="exactly one key must start with"):
        from_bitsandbytes({key: value for key, value in whole.items() if key != text_key})
    with pytest.raises(ValueError, match="needs exactly the tensors"):
        from_bitsandbytes({**whole, "scb": whole["absmax"]})
    for levels in ("quant_map", "nested_quant_map"):
        with pytest.raises(ValueError, match=f"^{levels}: the levels in the file are not those of its type"):
            from_bitsandbytes({**whole, levels: whole[levels] * 1.01})
    with pytest.raises(ValueError, match=r"weight: got 64 bytes; shape \[4, 64\] needs 128"):
        from_bitsandbytes({**whole, "weight": whole["weight"][::2]})
    text = json.loads(bytes(whole[text_key].tolist()))
    for field, value, message in (
        ("dtype", "float8", "dtype: got 'float8'"),
        ("blocksize", 48, "block_size: got 48"),
        ("quant_type", "fp4", "needs exactly"),
        ("shape", [4, 128], "absmax: got"),
    ):
        changed = torch.tensor(list(json.dumps({**text, field: value}).encode()), dtype=torch.uint8)
        with pytest.raises(ValueError, match=message):
            from_bitsandbytes({**whole, text_key: changed})
