"""A weight as few bits plus a low-rank part: starts of an adapter that repair a quantised base.

    LoftQ   Q_t = q(W - B_{t-1} A_{t-1}),  A_t, B_t = SVD_R(W - Q_t)      t = 1 .. T, B_0 A_0 = 0
    PiSSA   A, B = SVD_R(W),               Q = q(W - B A)

    SVD_R(M) = U_R S_R V_R^T is the nearest matrix of rank R; each factor takes the root of S_R.

LoftQ puts what rounding lost into the adapter; with T = 1, which brings most of it, the codes are those of W itself.
PiSSA puts the largest part of W there, so that what is rounded is smaller. Both begin at dq(Q) + B A, nearer to W than
dq(q(W)) is, where plain LoRA begins.

Sources: Li et al., "LoftQ", 2023, algorithm 1; Meng et al., "PiSSA", 2024, sections 3 and 4.2 (QPiSSA).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def principal(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of rank R, as factors.

    Args:
        matrix: fp32 ``[O, I]``, finite.
        rank: R, at most the smaller side.
    Returns: A ``[R, I]`` and B ``[O, R]``, whose product it is.
    Raises: ValueError: ``rank`` is below 1 or beyond the smaller side.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank: got {rank}; a matrix {list(matrix.shape)} has ranks 1 to {min(matrix.shape)}")
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()
    return root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root


def leading(matrix: Tensor, rank: int, *, iterations: int = 8) -> tuple[Tensor, Tensor]:
    """Nearly the nearest matrix of rank R, by subspace iteration: products of the matrix with 2R vectors, no full SVD.

    What is left of a rounding error, whose singular values fall slowly, is less than 0.1 % larger than `principal`
    leaves; a matrix whose singular values fall fast is met exactly. The same matrix gives the same factors every time.

    Args and returns: as `principal`.
    Raises: ValueError: as `principal`.
    """
    width = 2 * rank
    if width >= min(matrix.shape):
        return principal(matrix, rank)
    generator = torch.Generator().manual_seed(0)
    guess = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ guess)[0]  # [O, 2R]
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis)[0])[0]
    A, B = principal(basis.t() @ matrix, rank)
    return A, basis @ B


def loftq(
    weight: Tensor, rounded: Callable[[Tensor], Tensor], *, rank: int, iterations: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a weight into what is quantised and a low-rank part that repairs it (LoftQ, algorithm 1).

    Args:
        weight: ``[O, I]``, any float dtype.
        rounded: quantises and de-quantises a fp32 matrix.
        rank: of the low-rank part.
        iterations: T; 1 quantises the weight itself.
    Returns: A ``[R, I]``, B ``[O, R]``, and the matrix to quantise, fp32 ``[O, I]``.
    Raises: ValueError: ``rank`` or ``iterations`` is out of range.
    """
    if iterations < 1:
        raise ValueError(f"iterations: got {iterations}; allowed: at least 1; try iterations=1")
    exact = weight.float()
    target = exact
    for iteration in range(iterations):
        A, B = principal(exact - rounded(target), rank)
        if iteration + 1 < iterations:
            target = exact - B @ A
    return A, B, target


def pissa(weight: Tensor, *, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a weight into its principal part and what is quantised (PiSSA, section 3).

    Args and returns: as `loftq`.
    """
    exact = weight.float()
    A, B = principal(exact, rank)
    return A, B, exact - B @ A
