"""Starts of an adapter: the nearest low-rank matrix, and a base plus adapter that is nearer to the weight."""

import pytest
import torch

from longfit.numerics.low_rank import leading, loftq, pissa, principal
from longfit.numerics.quant_state import dequantize_4bit, quantize_4bit


def nf4(matrix):
    return dequantize_4bit(*quantize_4bit(matrix), dtype=torch.float32)


@pytest.mark.parametrize("shape", [(33, 80), (80, 33), (1, 5)])
def test_the_nearest_matrix_of_a_rank_leaves_the_smaller_singular_values(shape):
    matrix = torch.randn(shape)
    rank = min(shape[0], shape[1], 7)
    A, B = principal(matrix, rank)
    assert (A.shape, B.shape) == ((rank, shape[1]), (shape[0], rank))
    left = torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt()
    torch.testing.assert_close((matrix - B @ A).norm(), left, rtol=1e-4, atol=1e-4)  # fp32, 80 additions
    torch.testing.assert_close(A.norm(), B.norm())  # each factor takes the root


def test_one_iteration_quantises_the_weight_itself_and_repairs_it():
    weight = torch.randn(96, 128) * 0.02
    A, B, target = loftq(weight, nf4, rank=16)
    assert torch.equal(target, weight)
    before, after = (nf4(weight) - weight).norm(), (nf4(target) + B @ A - weight).norm()
    assert after < before
    left = torch.linalg.svdvals(weight - nf4(weight))[16:].square().sum().sqrt()
    torch.testing.assert_close(after, left, rtol=1e-4, atol=1e-6)


def test_more_iterations_do_not_lose():
    weight = torch.randn(96, 128) * 0.02
    errors = []
    for iterations in (1, 2, 5):
        A, B, target = loftq(weight, nf4, rank=16, iterations=iterations)
        errors.append(float((nf4(target) + B @ A - weight).norm()))
    # Each half step is the best one given the other but for the rounding, which is not a projection: no guarantee.
    assert errors[2] < errors[0] * 1.01


def test_pissa_rounds_what_is_left_of_a_weight_with_a_large_principal_part():
    weight = torch.randn(96, 128) * 0.02 + torch.randn(96, 2) @ torch.randn(2, 128) * 0.1
    A, B, target = pissa(weight, rank=2)
    torch.testing.assert_close(target + B @ A, weight, rtol=1e-5, atol=1e-6)
    assert (nf4(target) + B @ A - weight).norm() < 0.5 * (nf4(weight) - weight).norm()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="ranks 1 to 3"):
        principal(torch.randn(3, 5), 4)
    with pytest.raises(ValueError, match="at least 1"):
        loftq(torch.randn(3, 5), nf4, rank=1, iterations=0)


def test_subspace_iteration_comes_near_to_the_nearest():
    matrix = torch.randn(160, 200)  # flat singular values, the hardest case
    A, B = leading(matrix, 8)
    least = torch.linalg.svdvals(matrix)[8:].square().sum().sqrt()
    assert 0.9999 * least <= (matrix - B @ A).norm() <= 1.005 * least  # the first eight hold 9 %: it misses a little
    assert all(map(torch.equal, (A, B), leading(matrix, 8)))
    exact = torch.randn(160, 3) @ torch.randn(3, 200)
    torch.testing.assert_close(leading(exact, 3)[1] @ leading(exact, 3)[0], exact, rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, leading(matrix[:16], 8), principal(matrix[:16], 8)))  # no smaller basis to be had
