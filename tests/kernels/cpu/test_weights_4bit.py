"""The C++ kernels against `numerics`: the same bits on every instruction set; matmuls within the rounding of a sum."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longfit.kernels.cpu import library as cpu_library
from longfit.kernels.cpu import weights_4bit as cpu
from longfit.numerics import blockwise, quant_state, row_format
from longfit.numerics.codebooks import QUANT_TYPES, dynamic_map
from longfit.numerics.double_quant import DoubleQuant
from longfit.numerics.quant_state import QuantState
from longfit.numerics.row_format import RowFormat

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SOURCES = str(Path(cpu.__file__).parents[3])

by_examples = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def assert_same_bits(ours: Tensor, reference: Tensor) -> None:
    """NaN counts as NaN: its payload is not part of the format."""
    assert (ours.dtype, ours.shape) == (reference.dtype, reference.shape)
    bits = BITS[ours.element_size()]
    same = ours.contiguous().view(bits) == reference.contiguous().view(bits)
    if ours.is_floating_point():
        same |= ours.isnan() & reference.isnan()
    assert same.all(), f"{int((~same).sum())} of {same.numel()} differ"


def assert_same_state(ours: QuantState, reference: QuantState) -> None:
    assert (ours.quant_type, ours.block_size, ours.shape, ours.dtype) == (
        reference.quant_type,
        reference.block_size,
        reference.shape,
        reference.dtype,
    )
    if isinstance(reference.absmax, DoubleQuant):
        assert isinstance(ours.absmax, DoubleQuant)
        assert_same_bits(ours.absmax.codes, reference.absmax.codes)
        assert_same_bits(ours.absmax.absmax, reference.absmax.absmax)
        assert_same_bits(ours.absmax.offset, reference.absmax.offset)
    else:
        assert isinstance(ours.absmax, Tensor)
        assert_same_bits(ours.absmax, reference.absmax)


def weights(numel: int, dtype: torch.dtype, *, seed: int = 0, spoil: bool = False) -> Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    values[64:128] = 0  # a block of zeros
    if spoil:
        values[5:6], values[300:301] = float("nan"), float("-inf")
    return values


def spread_rows(rows: Tensor) -> Tensor:
    """The same rows with foreign bytes between them, starting at an odd address."""
    wide = rows.new_full((rows.shape[0], rows.shape[1] + 4), 0xFF)
    wide[:, 1:-3] = rows
    return wide[:, 1:-3]


def in_rows(weight: Tensor, **options: object) -> tuple[Tensor, Tensor, RowFormat]:
    packed, state = quant_state.quantize_4bit(weight, **options)  # type: ignore[arg-type]
    rows, constants = row_format.to_rows(packed, state)
    return spread_rows(rows), constants, RowFormat.of(state)


@by_examples
@given(
    numel=st.sampled_from([0, 1, 2, 31, 63, 64, 65, 127, 130, 4097, 20001]) | st.integers(0, 9000),
    quant_type=st.sampled_from(sorted(QUANT_TYPES)),
    block_size=st.sampled_from(quant_state.BLOCK_SIZES),
    absmax_block_size=st.sampled_from((32, 256)),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    spoil=st.booleans(),
    seed=st.integers(0, 99),
)
def test_4bit(
    isa: str,
    poisoned: None,
    numel: int,
    quant_type: str,
    block_size: int,
    absmax_block_size: int,
    double_quant: bool,
    dtype: torch.dtype,
    spoil: bool,
    seed: int,
) -> None:
    weight = weights(numel, dtype, seed=seed, spoil=spoil)
    packed, state = quant_state.quantize_4bit(
        weight,
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        absmax_block_size=absmax_block_size,
    )
    ours = cpu.quantize_4bit(
        weight,
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        absmax_block_size=absmax_block_size,
    )
    assert_same_bits(ours[0], packed)
    assert_same_state(ours[1], state)
    for target in DTYPES:
        assert_same_bits(cpu.dequantize_4bit(packed, state, target), quant_state.dequantize_4bit(packed, state, target))


def test_every_threshold_and_its_neighbours(isa: str) -> None:
    """Ties, one unit above and one below, and values that exceed 1 by a rounding after scaling."""
    for quant_type, levels in QUANT_TYPES.items():
        ordered = torch.tensor(levels).sort().values
        middle = (ordered[1:] + ordered[:-1]) / 2
        up, down = torch.tensor(float("inf")), torch.tensor(-float("inf"))
        values = torch.cat([middle, middle.nextafter(up), middle.nextafter(down), torch.ones(3)])  # [48]
        for scale in (1.0, 0.7, 1e-30, 3e38, 1e-41):
            options = {"quant_type": quant_type, "block_size": 64, "double_quant": False}
            expected, _ = quant_state.quantize_4bit(values * scale, **options)
            assert_same_bits(cpu.quantize_4bit(values * scale, absmax_block_size=256, **options)[0], expected)


def test_extreme_constants(isa: str, poisoned: None) -> None:
    """Products that overflow, are subnormal, or round to zero in the target type."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(6)  # 3072 codes
    for scale in (0.0, 1e-45, 1e-38, 3e-39, 6e-8, 1.0, 65520.0, 3.39e38, float("inf"), float("nan")):
        absmax = torch.full((48,), scale)
        absmax[3] = 0.5
        for quant_type in QUANT_TYPES:
            state = QuantState(quant_type, 64, (3072,), torch.float32, absmax)
            for dtype in DTYPES:
                expected = quant_state.dequantize_4bit(packed, state, dtype)
                assert_same_bits(cpu.dequantize_4bit(packed, state, dtype), expected)


@by_examples
@given(
    numel=st.sampled_from([0, 1, 255, 256, 257]) | st.integers(0, 5000),
    book=st.sampled_from(["signed", "unsigned", "even", "fp8", "shuffled", "close"]),
    block_size=st.sampled_from((1, 100, 256, 2048)),
    dtype=st.sampled_from(DTYPES),
    log_normal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_8bit(
    isa: str, poisoned: None, numel: int, book: str, block_size: int, dtype: torch.dtype, log_normal: bool, seed: int
) -> None:
    """The exact nearest level for any codebook: in any order, with levels closer than the table's buckets."""
    generator = torch.Generator().manual_seed(seed)
    codebook = {
        "signed": lambda: dynamic_map(signed=True),
        "unsigned": lambda: dynamic_map(signed=False),
        "even": lambda: torch.linspace(-1, 1, 255),
        "fp8": lambda: torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / 448,
        "shuffled": lambda: dynamic_map(signed=True)[torch.randperm(256, generator=generator)],
        "close": lambda: 0.5 + torch.arange(256) * 2.0**-23,
    }[book]()
    values = torch.randn(numel, generator=generator)
    values = ((4 * values).exp() if log_normal else values).to(dtype)
    if numel > 600:
        values[300] = float("nan")
    codes, absmax = blockwise.quantize_blockwise(values, codebook, block_size=block_size)
    ours = cpu.quantize_8bit(values, codebook, block_size=block_size)
    assert_same_bits(ours[0], codes)
    assert_same_bits(ours[1], absmax)
    if codebook.numel() == 256:
        for target in DTYPES:
            expected = blockwise.dequantize_blockwise(codes, absmax, codebook, block_size=block_size, dtype=target)
            assert_same_bits(
                cpu.dequantize_8bit(codes, absmax, codebook, block_size=block_size, dtype=target), expected
            )


def test_8bit_ties_go_to_the_lower_level(isa: str) -> None:
    for signed in (True, False):
        codebook = dynamic_map(signed=signed)
        middle = (codebook[1:] + codebook[:-1]) / 2
        up, down = torch.tensor(2.0), torch.tensor(-2.0)
        values = torch.cat([middle, middle.nextafter(up), middle.nextafter(down), codebook, torch.ones(1)])
        expected, _ = blockwise.quantize_blockwise(values, codebook, block_size=values.numel())
        assert_same_bits(cpu.quantize_8bit(values, codebook, block_size=values.numel())[0], expected)


SHAPES = st.sampled_from(
    [(1, 1), (1, 64), (3, 1), (7, 130), (65, 63), (63, 65), (40, 192), (130, 64), (5, 4160), (3, 8257)]
)


@by_examples
@given(
    shape=SHAPES | st.tuples(st.integers(1, 70), st.integers(1, 300)),
    block_size=st.sampled_from((32, 64, 256)),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_rows_and_matmuls(
    isa: str,
    poisoned: None,
    shape: tuple[int, int],
    block_size: int,
    double_quant: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    rows, constants, fmt = in_rows(weight, block_size=block_size, double_quant=double_quant)
    bytes_before = rows.clone(), constants.clone()
    dense = row_format.dequantize_rows(rows, constants, fmt, dtype)
    assert_same_bits(cpu.dequantize_rows(rows, constants, fmt, dtype, first_row=0), dense)
    if fmt.rows > 3:
        part = cpu.dequantize_rows(rows[2:-1], constants, fmt, dtype, first_row=2)
        assert_same_bits(part, dense[2:-1])
    for num_rows in (0, 1, 3, 16, 17, 33):
        x = torch.randn(num_rows, shape[1], generator=generator, dtype=torch.float64).to(dtype)
        grad = torch.randn(num_rows, shape[0], generator=generator, dtype=torch.float64).to(dtype)
        assert_product(cpu.linear_4bit(x, rows, constants, fmt), x, dense.t())
        assert_product(cpu.linear_4bit_grad_input(grad, rows, constants, fmt), grad, dense)
    assert torch.equal(rows, bytes_before[0])
    assert torch.equal(constants, bytes_before[1])


def assert_product(ours: Tensor, a: Tensor, b: Tensor) -> None:
    """Compare with the exact product.

    A sum of n products in fp32 (fp64 for fp64) is off by at most n units in the last place of the sum of magnitudes;
    the result is then rounded once to its type, by half a unit, or by half the smallest subnormal number.
    """
    exact, magnitudes = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    info = torch.finfo(ours.dtype)
    unit = min(info.eps, torch.finfo(torch.float32).eps)
    bound = info.eps / 2 * exact.abs() + (a.shape[1] + 2) * unit * magnitudes + info.smallest_normal * info.eps
    assert ours.shape == exact.shape
    assert ours.dtype == a.dtype
    assert ((ours.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("block_size", "shape"), [(64, (200, 1216)), (128, (77, 1153)), (32, (130, 640))])
def test_many_rows(isa: str, block_size: int, shape: tuple[int, int]) -> None:
    """More rows, columns and depth than the GEMM takes at once, each with a rest; rows of x with NaN in between."""
    weight = weights(shape[0] * shape[1], torch.bfloat16).view(shape)
    rows, constants, fmt = in_rows(weight, block_size=block_size)
    dense = row_format.dequantize_rows(rows, constants, fmt, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for call, features, factor in (
        (cpu.linear_4bit, shape[1], dense.t()),
        (cpu.linear_4bit_grad_input, shape[0], dense),
    ):
        wide = torch.full((1100, features + 3), float("nan"), dtype=torch.bfloat16)
        x = wide[:, 1 : features + 1]
        x.copy_(torch.randn(x.shape, generator=generator))
        product = call(x, rows, constants, fmt)
        assert_product(product, x, factor)
        if cpu_library.library().multiplies_4bit:
            # A sum depends neither on the other rows nor on the number of threads.
            torch.set_num_threads(3)
            assert_same_bits(call(x, rows, constants, fmt), product)
            assert_same_bits(call(x[500:533], rows, constants, fmt), product[500:533])


@pytest.mark.parametrize("in_features", [32, 64, 72, 80, 96, 160, 2112])
@pytest.mark.parametrize("block_size", [64, 128])
def test_rows_not_divisible_by_the_block(isa: str, in_features: int, block_size: int) -> None:
    rows, constants, fmt = in_rows(torch.randn(40, in_features), block_size=block_size)
    packed, state = row_format.from_rows(rows, constants, fmt)
    flat = quant_state.dequantize_4bit(packed, state, torch.bfloat16)
    assert_same_bits(cpu.dequantize_rows(rows, constants, fmt, torch.bfloat16, first_row=0), flat)
    identity = torch.eye(in_features, dtype=torch.bfloat16)  # 1 * w is exact: the product shows W itself
    assert_same_bits(cpu.linear_4bit(identity[:16], rows, constants, fmt).t(), flat[:, :16])
    assert_same_bits(cpu.linear_4bit(identity, rows, constants, fmt).t(), flat)
    assert_same_bits(cpu.linear_4bit_grad_input(torch.eye(40).bfloat16(), rows, constants, fmt), flat)


def test_zero_block_is_exactly_zero(isa: str) -> None:
    for double_quant in (False, True):
        weight = torch.randn(256)
        weight[64:128] = 0
        packed, state = cpu.quantize_4bit(
            weight, quant_type="nf4", block_size=64, double_quant=double_quant, absmax_block_size=256
        )
        assert (cpu.dequantize_4bit(packed, state, torch.bfloat16)[64:128] == 0).all()


def test_default_dtype_does_not_matter(isa: str) -> None:
    weight = weights(5000, torch.float32)
    options = {"quant_type": "nf4", "block_size": 64, "double_quant": True, "absmax_block_size": 256}
    expected = cpu.quantize_4bit(weight, **options)
    torch.set_default_dtype(torch.bfloat16)
    ours = cpu.quantize_4bit(weight, **options)
    assert_same_bits(ours[0], expected[0])
    assert_same_state(ours[1], expected[1])
    assert_same_bits(cpu.dequantize_4bit(*ours, torch.float32), quant_state.dequantize_4bit(*expected, torch.float32))


def test_strided_values(isa: str) -> None:
    wide = weights(6400, torch.bfloat16).view(50, 128)
    for view in (wide.t(), wide[:, ::3], wide[::2]):
        options = {"quant_type": "nf4", "block_size": 64, "double_quant": True, "absmax_block_size": 256}
        ours, expected = cpu.quantize_4bit(view, **options), quant_state.quantize_4bit(view, **options)
        assert_same_bits(ours[0], expected[0])
        assert_same_bits(
            cpu.dequantize_4bit(*ours, torch.bfloat16), quant_state.dequantize_4bit(*expected, torch.bfloat16)
        )


@pytest.mark.parametrize("shape", [(5, 16_448), (3, 40_001), (2, 33_000)])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_rows_that_are_cut_among_threads(isa: str, poisoned: None, shape: tuple[int, int], num_threads: int) -> None:
    """Several tasks a row, of which a thread runs those that follow each other as one; rows begin inside blocks."""
    weight = weights(shape[0] * shape[1], torch.bfloat16, spoil=True).view(shape)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for block_size in (32, 64, 256):
            rows, constants, fmt = in_rows(weight, block_size=block_size)
            expected = row_format.dequantize_rows(rows, constants, fmt, torch.bfloat16)
            assert_same_bits(cpu.dequantize_rows(rows, constants, fmt, torch.bfloat16, first_row=0), expected)
    finally:
        torch.set_num_threads(before)


def test_more_than_2_31_weights(isa: str) -> None:
    """The last rows of a weight of 2^33 elements, of which only those rows exist."""
    fmt = RowFormat(1 << 21, 4096)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (2, fmt.row_bytes), generator=generator, dtype=torch.uint8)
    constants = torch.rand(fmt.constant_bytes // 4, generator=generator).view(torch.uint8)
    expected = row_format.dequantize_rows(rows, constants, fmt, torch.bfloat16, first_row=fmt.rows - 2)
    assert_same_bits(cpu.dequantize_rows(rows, constants, fmt, torch.bfloat16, first_row=fmt.rows - 2), expected)


def test_flat_weight_of_more_than_2_31_elements(isa: str) -> None:
    """Odd rows of flat storage whose element numbers exceed 32 bits; most codes are pages nobody touches."""
    fmt = RowFormat(33_000, 70_001, double_quant=False)
    rows = torch.zeros(1, fmt.row_bytes, dtype=torch.uint8)
    last = fmt.out_features - 1
    first_block = last * fmt.in_features // 64
    rows[0, first_block * 32 : fmt.code_bytes] = 0xB3
    rows[0, fmt.code_bytes + 4 * first_block :] = torch.full((fmt.blocks_per_row - first_block,), 2.0).view(torch.uint8)
    out = torch.empty(1, fmt.in_features)
    cpu._dequantize(cpu._row_weight(rows, torch.empty(0), fmt), (last, 1), (0, fmt.in_features), out, fmt.in_features)
    level = [2 * QUANT_TYPES["nf4"][code] for code in (0xB, 0x3)]
    even = torch.arange(last * fmt.in_features, fmt.numel) % 2 == 0
    assert_same_bits(out[0], torch.where(even, torch.tensor(level[0]), torch.tensor(level[1])))


def test_two_python_threads(isa: str) -> None:
    torch.set_num_threads(2)
    weight = weights(300_000, torch.bfloat16)
    rows, constants, fmt = in_rows(weights(200 * 1024, torch.bfloat16).view(200, 1024))
    x = torch.randn(20, 1024).bfloat16()
    packed, state = quant_state.quantize_4bit(weight)
    expected = quant_state.dequantize_4bit(packed, state, torch.float32), cpu.linear_4bit(x, rows, constants, fmt)
    options = {"quant_type": "nf4", "block_size": 64, "double_quant": True, "absmax_block_size": 256}
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(8):
                ours = cpu.quantize_4bit(weight, **options)
                assert_same_bits(ours[0], packed)
                assert_same_bits(cpu.dequantize_4bit(*ours, torch.float32), expected[0])
                assert_same_bits(cpu.linear_4bit(x, rows, constants, fmt), expected[1])
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_works_after_fork() -> None:
    """A forked child has none of the parent's worker threads and must not wait for them."""
    if cpu_library.unavailable() is not None:
        pytest.skip(cpu_library.unavailable() or "")
    script = """
import os, torch
from longfit.kernels.dispatch import dequantize_4bit, quantize_4bit
torch.set_num_threads(4)
packed, state = quantize_4bit(torch.ones(1 << 20))
child = os.fork()
if child == 0:
    os._exit(0 if dequantize_4bit(packed, state)[-1].item() == 1 else 1)  # torch's own loops would hang
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {**os.environ, "PYTHONPATH": SOURCES}
    assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=120).returncode == 0


@given(
    length=st.integers(1, 200_000),
    depth=st.integers(1, 200_000),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
)
def test_tiles_stay_small_and_cover_the_weight(length: int, depth: int, dtype: torch.dtype) -> None:
    tile = cpu._tile(length, depth, dtype)
    assert 1 <= tile <= length
    assert tile * depth * dtype.itemsize <= max(cpu.TILE_BYTES, 8 * depth * dtype.itemsize)
