"""Matmuls with 4-bit weights in Triton: the product with the same weight, summed in another order."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from longfit.numerics import quant_state, row_format
from longfit.numerics.row_format import RowFormat

pytest.importorskip("triton", reason="the package triton is missing; it comes with the dev extra on Linux")

from longfit.kernels.triton import linear_4bit as triton_linear

pytestmark = pytest.mark.usefixtures("poisoned")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def _sums_in_float32() -> Iterator[None]:
    """A card's GEMM may otherwise add up parts of a sum in 16 bits."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    yield
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


def weight_in_rows(
    device: str, out_features: int, in_features: int, **options: object
) -> tuple[Tensor, Tensor, RowFormat]:
    packed, state = quant_state.quantize_4bit(torch.randn(out_features, in_features, device=device), **options)
    return (*row_format.to_rows(packed, state), RowFormat.of(state))


def assert_product(mine: Tensor, a: Tensor, b: Tensor) -> None:
    """``mine`` against ``a @ b``: n additions in fp32 (fp64) in any order, then one rounding to the dtype of ``a``.

    Each of the n partial sums is at most ``|a| @ |b|`` and adds half an ulp of the sum's type: n * eps / 2 * |a| @ |b|,
    for the kernel and for the reference here (fp64, none). Then half an ulp of the result.
    """
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    sums = torch.finfo(torch.promote_types(a.dtype, torch.float32)).eps
    bound = size * a.shape[-1] * sums / 2 + exact.abs() * torch.finfo(mine.dtype).eps
    smallest = torch.finfo(mine.dtype).smallest_normal * torch.finfo(mine.dtype).eps  # of the subnormals
    assert mine.dtype == a.dtype
    assert bool(((mine.double() - exact).abs() <= bound + smallest).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("num_rows", [0, 1, 5, 16, 17])
def test_few_rows_and_many(triton_device: str, dtype: torch.dtype, num_rows: int) -> None:
    rows, constants, fmt = weight_in_rows(triton_device, 70, 320)
    dense = row_format.dequantize_rows(rows, constants, fmt, dtype)
    x = torch.randn(num_rows, 320, device=triton_device).to(dtype)
    assert_product(triton_linear.linear_4bit(x, rows, constants, fmt), x, dense.t())
    grad = torch.randn(num_rows, 70, device=triton_device).to(dtype)
    assert_product(triton_linear.linear_4bit_grad_input(grad, rows, constants, fmt), grad, dense)


# Blocks shorter and longer than the columns taken at a time; a single block; outputs of one and of several programs.
@pytest.mark.parametrize(("out_features", "in_features", "block_size"), [
    (33, 352, 32), (1, 64, 64), (64, 768, 256), (31, 1024, 512), (40, 4096, 4096),
])  # fmt: skip
@pytest.mark.parametrize("double_quant", [False, True])
def test_fused_kernel_with_any_block(
    triton_device: str, out_features: int, in_features: int, block_size: int, double_quant: bool
) -> None:
    rows, constants, fmt = weight_in_rows(
        triton_device, out_features, in_features, block_size=block_size, double_quant=double_quant, absmax_block_size=32
    )
    dense = row_format.dequantize_rows(rows, constants, fmt, torch.float32)
    x = torch.randn(3, in_features, device=triton_device)
    assert_product(triton_linear.linear_4bit(x, rows, constants, fmt), x, dense.t())


def test_blocks_across_rows_take_the_dense_path(triton_device: str) -> None:
    rows, constants, fmt = weight_in_rows(triton_device, 7, 72)
    dense = row_format.dequantize_rows(rows, constants, fmt, torch.float32)
    x, grad = torch.randn(2, 1, 72, device=triton_device), torch.randn(3, 7, device=triton_device)
    assert_product(triton_linear.linear_4bit(x, rows, constants, fmt), x, dense.t())
    assert_product(triton_linear.linear_4bit_grad_input(grad, rows, constants, fmt), grad, dense)


def test_strides_and_leading_axes(triton_device: str) -> None:
    rows, constants, fmt = weight_in_rows(triton_device, 40, 192)
    dense = row_format.dequantize_rows(rows, constants, fmt, torch.float32)
    wide = torch.nn.functional.pad(rows, (3, 5))[:, 3:-5]  # rows further apart, at an odd byte
    for x in (torch.randn(192, 9, device=triton_device).t(), torch.randn(2, 3, 5, 192, device=triton_device)):
        assert_product(triton_linear.linear_4bit(x, wide, constants, fmt), x, dense.t())
    assert triton_linear.linear_4bit(x, rows, constants, fmt).shape == (2, 3, 5, 40)


def test_a_broken_row_breaks_no_other(triton_device: str) -> None:
    weight = torch.randn(40, 64, device=triton_device)
    weight[7, 3] = float("nan")
    packed, state = quant_state.quantize_4bit(weight, double_quant=False)
    rows, constants = row_format.to_rows(packed, state)
    y = triton_linear.linear_4bit(torch.randn(2, 64, device=triton_device), rows, constants, RowFormat.of(state))
    assert y.isnan().all(0).tolist() == [output == 7 for output in range(40)]
