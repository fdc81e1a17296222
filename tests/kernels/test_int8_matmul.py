"""Integer products are exact on every processor, also where torch's own saturate."""

import pytest
import torch

from longfit.kernels import int8_matmul
from longfit.kernels.int8_matmul import EXACT_TERMS, linear_8bit
from longfit.numerics.vectorwise import linear_int8, quantize_vectors

SHAPES = [(1, 1, 1), (17, 33, 5), (3, 2 * EXACT_TERMS + 1, 7), (2, 0, 4), (64, 576, 96)]


@pytest.fixture(params=["fastest", "fp32"])
def path(request, monkeypatch):
    if request.param == "fp32":  # as on a processor without VNNI
        monkeypatch.setattr(int8_matmul, "integer_product_is_exact", lambda device: False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("worst", [False, True])
def test_products_are_exact(shape, worst, path):
    rows, columns, outputs = shape
    a = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    stored = torch.randint(-127, 128, (outputs, columns + 4), dtype=torch.int8)
    b = stored[:, :columns]  # as it lies before a row's constant
    if worst:
        a.fill_(127)
        b.fill_(-127)
    product = int8_matmul.int8_matmul(a, b)
    assert product.dtype == torch.int32
    assert torch.equal(product, a.long() @ b.long().t())


def test_a_processor_that_saturates_is_found_out(monkeypatch):
    saturating = lambda a, b: (a.float() @ b.float()).clamp(-32768, 32767).to(torch.int32)  # noqa: E731
    int8_matmul.integer_product_is_exact.cache_clear()
    monkeypatch.setattr(int8_matmul, "int8_product", saturating)
    assert not int8_matmul.integer_product_is_exact(torch.device("cpu"))
    int8_matmul.integer_product_is_exact.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_the_fast_product_equals_the_reference(dtype, threshold, path):
    x = torch.randn(2, 9, 160, dtype=dtype)
    x[1, 4, 7] = 40.0
    codes, absmax = quantize_vectors(torch.randn(96, 160))
    fast = linear_8bit(x, codes, absmax, threshold=threshold)
    assert fast.dtype == dtype
    # The same integers and scales; only the order of a few outliers' fp32 products differs.
    torch.testing.assert_close(fast, linear_int8(x, codes, absmax, threshold=threshold), rtol=1e-6, atol=1e-5)


def test_a_card_s_rule_for_shapes_is_met():
    """More than 16 rows and multiples of 8; zeros change no product."""
    a = torch.randint(-127, 128, (3, 9), dtype=torch.int8)
    b = torch.randint(-127, 128, (5, 9), dtype=torch.int8)
    padded_a, padded_b = int8_matmul.padded(a, b)
    assert padded_a.shape[0] > 16
    assert padded_a.shape[1] % 8 == 0
    assert padded_b.shape[1] % 8 == 0
    assert torch.equal((padded_a.long() @ padded_b.long())[:3, :5], a.long() @ b.long().t())
