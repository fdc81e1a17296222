"""LLM.int8(): equal to its formula and to bitsandbytes, whole where bitsandbytes is, token by token otherwise."""

import pytest
import torch

from longfit.numerics.vectorwise import (
    dequantize_vectors,
    linear_int8,
    quantize_vectors,
    split_outliers,
)

SHAPES = [(1, 1), (5, 3), (33, 80), (64, 576), (7, 4099)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_row_errs_by_half_a_step_at_most(shape, dtype):
    weight = torch.randn(shape, dtype=dtype) * torch.logspace(-3, 2, shape[0], dtype=dtype).unsqueeze(1)
    codes, absmax = quantize_vectors(weight)
    assert codes.dtype == torch.int8
    assert int(codes.abs().amax(dim=1).min()) == 127  # the largest of each row is met
    error = (dequantize_vectors(codes, absmax, dtype=torch.float32) - weight.float()).abs()
    assert torch.all(error <= absmax.unsqueeze(1) / 254 * (1 + 1e-4))  # fp32 rounding of a step: 127 * 2^-24


def test_codes_are_those_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 160, dtype=torch.float16)
    codes, absmax = quantize_vectors(weight)
    theirs, their_absmax, _ = bitsandbytes.int8_vectorwise_quant(weight.clone())
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, their_absmax)
    # (codes * absmax) * (1 / 127) there, codes * (absmax / 127) here: two fp32 roundings each.
    ours = dequantize_vectors(codes, absmax, dtype=torch.float32)
    torch.testing.assert_close(ours, bitsandbytes.int8_vectorwise_dequant(theirs, their_absmax), rtol=2**-22, atol=0)


@pytest.mark.parametrize("outlier_columns", [0, 3])
def test_the_product_is_that_of_bitsandbytes_where_whole_columns_are_taken_out(outlier_columns):
    pytest.importorskip("bitsandbytes")
    x = torch.randn(17, 160, dtype=torch.float16).clamp_(-5, 5)
    x[3, :outlier_columns] = 11.0
    codes, absmax = quantize_vectors(torch.randn(96, 160, dtype=torch.float16))
    x_codes, x_absmax, columns = torch.ops.bitsandbytes.int8_vectorwise_quant(x.clone(), 6.0)
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x, x_codes, codes, x_absmax, absmax, columns, None)
    ours = linear_int8(x, codes, absmax, whole_columns=True)
    # bitsandbytes rounds the integer part to fp16 (2^-11), adds outliers in fp16, and writes 1 / 127^2 as 6.200124e-05,
    # which is 1.8e-5 too much.
    scale = theirs.float().abs().max()
    assert (ours.float() - theirs.float()).abs().max() <= (2 * 2**-11 + 2e-5) * scale


def test_zeros_nan_and_infinity_stay_in_their_row():
    weight = torch.randn(4, 33)
    weight[0] = 0
    weight[1, 5] = float("nan")
    weight[2, 5] = float("inf")
    codes, absmax = quantize_vectors(weight)
    values = dequantize_vectors(codes, absmax, dtype=torch.float32)
    assert torch.equal(values[0], torch.zeros(33))
    assert values[1:3].isnan().all()
    assert values[3].isfinite().all()
    assert quantize_vectors(torch.empty(3, 0))[0].shape == (3, 0)


@pytest.mark.parametrize("whole_columns", [False, True])
def test_what_is_taken_out_and_what_stays(whole_columns):
    x = torch.tensor([[1.0, 7.0, -6.0], [2.0, 3.0, 1.0]])
    inliers, columns, outliers = split_outliers(x, 6.0, whole_columns=whole_columns)
    assert columns.tolist() == [1, 2]
    assert inliers.tolist() == [[1, 0, 0], [2, 3, 1]]
    assert outliers.tolist() == [[7, -6], [3, 1] if whole_columns else [0, 0]]
    assert split_outliers(x, 0)[1].numel() == 0  # 0 takes none out


def test_a_token_does_not_depend_on_its_neighbours():
    """Tiles of a sequence, batches and single tokens agree; with the paper's whole columns they do not."""
    x = torch.randn(64, 160)
    x[10, 7] = 40.0
    codes, absmax = quantize_vectors(torch.randn(96, 160))
    together = linear_int8(x, codes, absmax)
    alone = torch.cat([linear_int8(token[None], codes, absmax) for token in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)  # fp32: one product of an outlier more or less
    columns = linear_int8(x, codes, absmax, whole_columns=True)
    assert (columns - together).abs().max() > 1e-3


def test_outliers_are_worth_taking_out():
    x = torch.randn(32, 256)
    x[:, 3] = 60.0  # its row's constant would leave 4 bits for all others
    weight = torch.randn(64, 256)
    codes, absmax = quantize_vectors(weight)
    exact = x @ weight.t()
    with_outliers, without = (
        (linear_int8(x, codes, absmax, threshold=threshold) - exact).norm() for threshold in (6.0, 0.0)
    )
    assert with_outliers < without / 4


def test_only_matrices_of_floats_are_taken():
    with pytest.raises(ValueError, match="matrix"):
        quantize_vectors(torch.randn(3, 4, 5))
    with pytest.raises(TypeError, match="int32"):
        quantize_vectors(torch.ones(3, 4, dtype=torch.int32))
