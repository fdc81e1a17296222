"""Rows of bytes: an exact rearrangement, any run of rows decodes alone, indices beyond 32 bits."""

import pytest
import torch

from longfit.numerics.codebooks import codebook, dynamic_map
from longfit.numerics.quant_state import dequantize_4bit, quantize_4bit
from longfit.numerics.row_format import RowFormat, dequantize_rows, from_rows, to_rows

SHAPES = [(1, 64), (40, 64), (130, 192), (9, 72), (5, 160), (3, 33), (1, 1), (7, 2112)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("quant_type", "block_size", "absmax_block_size"), [("nf4", 64, 256), ("fp4", 32, 32)])
def test_rows_hold_the_same_bytes(
    shape: tuple[int, int], double_quant: bool, quant_type: str, block_size: int, absmax_block_size: int
) -> None:
    packed, state = quantize_4bit(
        torch.randn(shape, dtype=torch.float16),
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        absmax_block_size=absmax_block_size,
    )
    fmt = RowFormat.of(state)
    rows, constants = to_rows(packed, state)
    assert fmt.rows == (shape[0] if shape[1] % block_size == 0 else 1)
    assert rows.shape == (fmt.rows, fmt.row_bytes)
    assert constants.shape == (fmt.constant_bytes,)
    assert rows.nbytes + constants.nbytes == state.nbytes
    back, state_back = from_rows(rows, constants, fmt)
    assert torch.equal(back, packed)
    assert RowFormat.of(state_back) == fmt
    assert torch.equal(state_back.block_absmax(), state.block_absmax())
    for mine, theirs in zip(to_rows(back, state_back), (rows, constants), strict=True):
        assert torch.equal(mine, theirs)
    for dtype in (None, torch.float32, torch.bfloat16):
        assert torch.equal(dequantize_rows(rows, constants, fmt, dtype), dequantize_4bit(packed, state, dtype))


@pytest.mark.parametrize("double_quant", [True, False])
def test_golden_layout(double_quant: bool) -> None:
    weight = torch.stack([codebook("nf4"), codebook("nf4").flip(0) * 4]).repeat(1, 2)  # [2, 32]
    packed, state = quantize_4bit(weight, block_size=32, double_quant=double_quant)
    rows, constants = to_rows(packed, state)
    codes = ["0123456789abcdef" * 2, "fedcba9876543210" * 2]
    if double_quant:  # absmax 1 and 4: offset 2.5, nested absmax 1.5; -1 is nearest to the lowest level, code 0
        scales, shared = ["00", "ff"], "0000c03f" + "00002040"
    else:
        scales, shared = ["0000803f", "00008040"], ""
    assert [bytes(row.tolist()).hex() for row in rows] == [a + b for a, b in zip(codes, scales, strict=True)]
    assert bytes(constants.tolist()).hex() == shared


@pytest.mark.parametrize("double_quant", [True, False])
def test_any_run_of_rows_decodes_alone(double_quant: bool) -> None:
    packed, state = quantize_4bit(torch.randn(90, 384), double_quant=double_quant, absmax_block_size=32)
    fmt = RowFormat.of(state)
    rows, constants = to_rows(packed, state)
    weight = dequantize_4bit(packed, state)
    for start, stop in ((0, 1), (5, 7), (0, 90), (89, 90), (41, 41)):  # 6 blocks a row, 32 to a nested absmax
        part = dequantize_rows(rows[start:stop], constants, fmt, first_row=start)
        assert torch.equal(part, weight[start:stop])
    strided = torch.stack([rows, rows.flip(0)], dim=1)[:, 0]  # rows with a gap between them
    assert torch.equal(dequantize_rows(strided, constants, fmt), weight)
    assert torch.equal(from_rows(strided, constants, fmt)[0], packed)


def test_indices_beyond_32_bits() -> None:
    # 3 * 2^30 blocks: an index that wrapped around in 32 bits would be negative and count from the wrong end
    num_rows = 3 * 2**18
    fmt = RowFormat(num_rows, in_features=2**17, block_size=32, absmax_block_size=4096)
    nested = torch.arange(num_rows, dtype=torch.float32)  # a row has 4096 blocks: one nested constant each
    constants = torch.cat([nested, torch.tensor([0.5])]).view(torch.uint8)
    rows = torch.full((2, fmt.row_bytes), 0xFF, dtype=torch.uint8)  # code 15 is 1.0, constant code 255 is 1.0
    weight = dequantize_rows(rows, constants, fmt, torch.float64, first_row=num_rows - 2)
    assert dynamic_map(signed=True)[255] == 1
    assert (weight[0] == num_rows - 2 + 0.5).all()
    assert (weight[1] == num_rows - 1 + 0.5).all()


def test_owned_memory() -> None:
    packed, state = quantize_4bit(torch.randn(4, 64))
    rows, constants = to_rows(packed, state)
    back, state_back = from_rows(rows, constants, RowFormat.of(state))
    rows.zero_()
    constants.zero_()
    assert torch.equal(back, packed)
    assert torch.equal(state_back.block_absmax(), state.block_absmax())


def test_formats_are_values() -> None:
    assert len({RowFormat(4, 64), RowFormat(4, 64), RowFormat(4, 128)}) == 2
    fmt = RowFormat(out_features=10, in_features=256, double_quant=False)
    assert (fmt.columns, fmt.code_bytes, fmt.scale_bytes, fmt.row_bytes) == (256, 128, 16, 144)
    flat = RowFormat(out_features=3, in_features=33)
    assert (flat.rows, flat.columns, flat.code_bytes, flat.scale_bytes, flat.constant_bytes) == (1, 99, 50, 2, 8)


def test_bad_arguments_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"shape: got \[64\]; rows need a matrix"):
        to_rows(*quantize_4bit(torch.randn(64)))
    with pytest.raises(ValueError, match="block_size: got 48; allowed: 32"):
        RowFormat(4, 64, block_size=48)
    with pytest.raises(ValueError, match=r"shape: got \[0, 64\]; allowed: at least \[1, 1\]"):
        RowFormat(0, 64)
    packed, state = quantize_4bit(torch.randn(4, 64), double_quant=False)
    rows, constants = to_rows(packed, state)
    fmt = RowFormat.of(state)
    with pytest.raises(ValueError, match=r"rows: got torch.uint8 \[4, 35\]; .*needs uint8 \[4, 36\]"):
        from_rows(rows[:, :-1], constants, fmt)
    with pytest.raises(ValueError, match=r"constants: got torch.uint8 \[4\]; .*needs uint8 \[0\]"):
        from_rows(rows, rows[0, :4], fmt)
    for first_row in (-1, 3):
        with pytest.raises(ValueError, match=f"first_row: got {first_row} with 2 rows; the weight is laid out in 4"):
            dequantize_rows(rows[:2], constants, fmt, first_row=first_row)
