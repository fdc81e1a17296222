"""The Triton kernels for 4-bit weights have the bits of the reference: interpreted here, compiled where a card is."""

import pytest
import torch
from tests.kernels.same_bits import assert_same
from torch import Tensor

from longfit.numerics import quant_state, row_format
from longfit.numerics.codebooks import codebook
from longfit.numerics.double_quant import DoubleQuant
from longfit.numerics.quant_state import QuantState
from longfit.numerics.row_format import RowFormat

pytest.importorskip("triton", reason="the package triton is missing; it comes with the dev extra on Linux")

from longfit.kernels.triton import weights_4bit as triton_4bit

pytestmark = pytest.mark.usefixtures("poisoned")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# One code, half a byte too much, around a block, around what a program handles, several programs.
NUMELS = (0, 1, 63, 64, 65, 130, 2049, 4097, 9000)


def assert_same_state(mine: QuantState, theirs: QuantState) -> None:
    assert (mine.quant_type, mine.block_size, mine.shape, mine.dtype) == (
        theirs.quant_type, theirs.block_size, theirs.shape, theirs.dtype,
    )  # fmt: skip
    if isinstance(mine.absmax, DoubleQuant) and isinstance(theirs.absmax, DoubleQuant):
        assert mine.absmax.absmax_block_size == theirs.absmax.absmax_block_size
        for a, b in (
            (mine.absmax.codes, theirs.absmax.codes),
            (mine.absmax.absmax, theirs.absmax.absmax),
            (mine.absmax.offset, theirs.absmax.offset),
        ):
            assert_same(a, b)
    else:
        assert isinstance(mine.absmax, Tensor)
        assert isinstance(theirs.absmax, Tensor)
        assert_same(mine.absmax, theirs.absmax)


def both_ways(weight: Tensor, **options: object) -> tuple[Tensor, QuantState]:
    """Quantise by the kernel and by the reference, on the same device; hold the one against the other."""
    settings = {"quant_type": "nf4", "block_size": 64, "double_quant": True, "absmax_block_size": 256, **options}
    packed, state = triton_4bit.quantize_4bit(weight, **settings)
    expected, expected_state = quant_state.quantize_4bit(weight, **settings)
    assert_same(packed, expected)
    assert_same_state(state, expected_state)
    return packed, state


class TestQuantize:
    @pytest.mark.parametrize("numel", NUMELS)
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
    def test_any_length(self, triton_device: str, quant_type: str, numel: int) -> None:
        both_ways(torch.randn(numel, device=triton_device), quant_type=quant_type)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("block_size", [32, 256, 4096])
    def test_any_dtype_and_block(self, triton_device: str, dtype: torch.dtype, block_size: int) -> None:
        weight = torch.randn(5, 1003, device=triton_device).to(dtype)
        both_ways(weight, block_size=block_size, double_quant=False)
        both_ways(weight.t(), block_size=block_size, absmax_block_size=32)

    @pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
    def test_every_threshold_and_its_neighbours(self, triton_device: str, quant_type: str) -> None:
        """Blocks with absmax 1, so that values are scaled by exactly 1; equality stays at the lower level."""
        levels = codebook(quant_type).sort().values
        middle = (levels[:-1] + levels[1:]) / 2
        values = torch.cat([middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0)), levels])
        blocks = torch.ones(-(-values.numel() // 31), 32)
        padded = torch.zeros(blocks.shape[0] * 31)
        padded[: values.numel()] = values
        blocks[:, 1:] = padded.view(-1, 31)
        both_ways(blocks.to(triton_device), quant_type=quant_type, block_size=32, double_quant=False)

    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_zeros_tiny_huge_and_broken_blocks(self, triton_device: str, quant_type: str) -> None:
        weight = torch.randn(9, 64)
        weight[1] = 0
        weight[2] *= 1e-42  # subnormal: its reciprocal would be infinite
        weight[3] *= 1e37
        weight[4, 5], weight[5, 60], weight[6, 0] = float("nan"), float("inf"), float("-inf")
        weight[7] = -0.0
        both_ways(weight.flatten()[:-1].to(triton_device), quant_type=quant_type, double_quant=False)
        both_ways(weight.flatten()[: 6 * 64 - 1].to(triton_device), quant_type=quant_type)  # the odd block is broken


class TestDequantize:
    @pytest.mark.parametrize("numel", NUMELS)
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_any_length(self, triton_device: str, numel: int, double_quant: bool) -> None:
        weight = torch.randn(numel, device=triton_device)
        packed, state = quant_state.quantize_4bit(weight, double_quant=double_quant)
        for dtype in FLOATS:
            mine = triton_4bit.dequantize_4bit(packed, state, dtype)
            assert_same(mine, quant_state.dequantize_4bit(packed, state, dtype))

    @pytest.mark.parametrize("block_size", [32, 128, 4096])
    @pytest.mark.parametrize("absmax_block_size", [32, 256])
    def test_any_block(self, triton_device: str, block_size: int, absmax_block_size: int) -> None:
        weight = torch.randn(3, 43, 71, device=triton_device).half()
        packed, state = quant_state.quantize_4bit(
            weight, quant_type="fp4", block_size=block_size, absmax_block_size=absmax_block_size
        )
        mine = triton_4bit.dequantize_4bit(packed, state, torch.float32)
        assert_same(mine, quant_state.dequantize_4bit(packed, state, torch.float32))

    def test_a_broken_block_stays_the_only_one(self, triton_device: str) -> None:
        weight = torch.randn(10, 64, device=triton_device)
        weight[3, 3] = float("nan")
        packed, state = both_ways(weight, double_quant=False)
        mine = triton_4bit.dequantize_4bit(packed, state, torch.bfloat16)
        assert_same(mine, quant_state.dequantize_4bit(packed, state, torch.bfloat16))
        assert mine.isnan().all(1).tolist() == [row == 3 for row in range(10)]


# Whole blocks in a row; a row of one block; blocks across rows, with whole bytes and without; one row.
SHAPES = ((9, 192), (70, 64), (7, 72), (3, 33), (1, 4160))


class TestRows:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_any_shape(self, triton_device: str, shape: tuple[int, int], double_quant: bool) -> None:
        packed, state = quant_state.quantize_4bit(torch.randn(shape, device=triton_device), double_quant=double_quant)
        rows, constants = row_format.to_rows(packed, state)
        fmt = RowFormat.of(state)
        for dtype in FLOATS:
            mine = triton_4bit.dequantize_rows(rows, constants, fmt, dtype, first_row=0)
            assert_same(mine, row_format.dequantize_rows(rows, constants, fmt, dtype))

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_a_run_of_rows_in_unaligned_strided_memory(self, triton_device: str, double_quant: bool) -> None:
        """Rows cut out of wider ones at an odd byte, and shared constants that begin at an odd byte."""
        weight = torch.randn(40, 192, device=triton_device)
        packed, state = quant_state.quantize_4bit(
            weight, block_size=32, double_quant=double_quant, absmax_block_size=32
        )
        rows, constants = row_format.to_rows(packed, state)
        fmt = RowFormat.of(state)
        wide = torch.full((40, fmt.row_bytes + 8), 255, dtype=torch.uint8, device=triton_device)
        wide[:, 3 : 3 + fmt.row_bytes] = rows
        shifted = torch.cat([constants.new_zeros(1), constants])[1:]
        for first, last in ((0, 40), (7, 23), (39, 40), (5, 5)):
            run = wide[first:last, 3 : 3 + fmt.row_bytes]
            mine = triton_4bit.dequantize_rows(run, shifted, fmt, torch.float32, first_row=first)
            expected = row_format.dequantize_rows(run, shifted, fmt, torch.float32, first_row=first)
            assert_same(mine, expected)


@pytest.mark.gpu
def test_a_cuda_graph_can_hold_all_of_it(triton_device: str) -> None:
    weight = torch.randn(128, 192, device=triton_device)
    results: list[Tensor] = []

    def work() -> None:
        packed, state = triton_4bit.quantize_4bit(
            weight, quant_type="nf4", block_size=64, double_quant=True, absmax_block_size=256
        )
        results[:] = [packed, triton_4bit.dequantize_4bit(packed, state, torch.float32)]

    work()  # compiles, and puts the tables on the device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    weight.copy_(torch.randn(128, 192))
    graph.replay()
    packed, state = quant_state.quantize_4bit(weight)
    assert_same(results[0], packed)
    assert_same(results[1], quant_state.dequantize_4bit(packed, state, torch.float32))


@pytest.mark.gpu
def test_more_than_two_to_the_31_weights(triton_device: str) -> None:
    """The last blocks of a weight whose element numbers and addresses need more than 31 bits."""
    numel = (1 << 31) + 6 * 64 + 3
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    weight = torch.zeros(numel, dtype=torch.bfloat16, device=triton_device)
    weight[-300:] = torch.randn(300)
    packed, state = triton_4bit.quantize_4bit(
        weight, quant_type="nf4", block_size=64, double_quant=False, absmax_block_size=256
    )
    start = (1 << 31) - 64
    expected, tail = quant_state.quantize_4bit(weight[start:], double_quant=False)
    assert_same(packed[start // 2 :], expected)
    del weight
    decoded = triton_4bit.dequantize_4bit(packed, state, torch.bfloat16)
    assert_same(decoded[start:], quant_state.dequantize_4bit(expected, tail, torch.bfloat16))
