"""Products of 8-bit integers, exact, in whatever multiplies them fast here.

torch's own product is fast where a processor has VNNI. Where it has not, oneDNN's kernels add pairs of products in 16
bits and saturate: wrong without a word. So it is tried once on the worst case, and where it fails the product is
taken in fp32, at most `EXACT_TERMS` terms at a time, which is exact too and several times slower.
"""

from functools import cache

import torch
from torch import Tensor

from longfit.compat.torch import int8_product
from longfit.numerics.vectorwise import (
    THRESHOLD,
    dequantize_vectors,
    quantize_vectors,
    scale_product,
    split_outliers,
)

EXACT_TERMS = 1040
"""Products of two 8-bit codes that fp32 adds without rounding: 1040 * 127 * 127 < 2^24."""


def linear_8bit(x: Tensor, codes: Tensor, absmax: Tensor, *, threshold: float = THRESHOLD) -> Tensor:
    """Multiply activations by an 8-bit weight in integers; see `longfit.numerics.vectorwise.linear_int8`."""
    flat = x.reshape(-1, x.shape[-1])
    inliers, columns, outliers = split_outliers(flat, threshold)
    x_codes, x_absmax = quantize_vectors(inliers)
    y = scale_product(int8_matmul(x_codes, codes).float(), x_absmax, absmax)
    if columns.numel():
        y.addmm_(outliers.float(), dequantize_vectors(codes[:, columns], absmax, dtype=torch.float32).t())
    out = x.new_empty(*x.shape[:-1], codes.shape[0])  # its own tensor, no view: a bias is added in place
    out.view(y.shape).copy_(y)
    return out


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply ``a b^T`` exactly.

    Args:
        a: int8 ``[N, I]``; b: int8 ``[O, I]``, rows may be strided; both in -127..127, at most 133,000 columns.
    Returns: int32 ``[N, O]``.
    """
    if integer_product_is_exact(a.device):
        operands = padded(a, b) if a.is_cuda else (a, b.t())
        return int8_product(*operands)[: a.shape[0], : b.shape[0]]
    product = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for first in range(0, a.shape[1], EXACT_TERMS):
        run = slice(first, first + EXACT_TERMS)
        product += (a[:, run].float() @ b[:, run].float().t()).to(torch.int32)
    return product


@cache
def integer_product_is_exact(device: torch.device) -> bool:
    """Whether torch's product adds the largest products there are without saturating, on this device."""
    a = torch.full((32, 64), 127, dtype=torch.int8, device=device)
    b = torch.full((32, 64), -127, dtype=torch.int8, device=device)
    try:
        product = int8_product(a, b.t())
    except (RuntimeError, NotImplementedError):
        return False
    return bool((product == -64 * 127 * 127).all())


def padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``a`` and ``b^T`` as torch's product takes them on a card: more than 16 rows, the rest multiples of 8."""
    rows, columns, outputs = max(0, 17 - a.shape[0]), -a.shape[1] % 8, -b.shape[0] % 8
    pad = torch.nn.functional.pad
    return pad(a, (0, columns, 0, rows)), pad(b, (0, columns, 0, outputs)).t()
