"""LLM.int8(): vector-wise 8-bit products, outlying activations in 16 bits (Dettmers et al., 2022, sections 2, 3).

    W  ~ codes_W * absmax_W / 127      one constant for each row of W, that is for each output
    X  = X_in + X_out                  X_out: magnitudes of ``threshold`` and above
    Y  = (codes_X codes_W^T) * (absmax_X / 127) (absmax_W / 127)^T  +  X_out dq(W)^T
         exact, in integers; X_in has one constant for each token

The paper takes a whole column of X into 16 bits where any token has an outlier in it. Then what a token becomes depends
on which other tokens are multiplied at the same time, so that tiles, batches and generation differ. Here each token
decides for itself unless ``whole_columns`` is set: an outlier goes into 16 bits, the ordinary values of that feature
stay in 8. bitsandbytes takes whole columns.

This is the arithmetic. `row_format.py` has no 8-bit layout: `layers/linear8bit.py` keeps a row's constant behind its
codes. Blocks that cross rows are in `absmax.py`.
"""

import torch
from torch import Tensor

from longfit.numerics.absmax import INT8_MAX, flatten_floats, quantize_int8

THRESHOLD = 6.0
"""Magnitude of an outlier (section 3.1): found on activations, never on weights."""

# Rows quantised at once: 4 MiB per fp32 temporary.
SLICE_NUMEL = 1 << 20


def quantize_vectors(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 8-bit integers scaled by its own absmax (section 2, "vector-wise quantization").

    Args:
        values: ``[N, I]``, fp16, bf16, fp32 or fp64; arithmetic is fp32.
    Returns: codes int8 ``[N, I]`` in -127..127; absmax fp32 ``[N]``, NaN for a row that holds NaN or infinity.
    Raises: TypeError: not floats. ValueError: not a matrix.
    """
    flatten_floats(values)
    if values.dim() != 2:
        raise ValueError(f"values: got {list(values.shape)}; vectors are the rows of a matrix [N, I]; reshape it")
    codes = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    absmax = torch.zeros(values.shape[0], dtype=torch.float32, device=values.device)
    if not values.numel():
        return codes, absmax
    step = max(1, SLICE_NUMEL // values.shape[1])
    for first in range(0, values.shape[0], step):
        run = slice(first, first + step)
        codes[run], absmax[run] = quantize_int8(values[run], block_size=values.shape[1])
    return codes, absmax


def dequantize_vectors(codes: Tensor, absmax: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Turn codes back into values: ``codes * (absmax / 127)`` in fp32, rounded once to ``dtype``.

    Args:
        codes: int8 ``[N, I]``; absmax: fp32 ``[N]``.
    Returns: ``[N, I]`` in ``dtype``.
    """
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    step = max(1, SLICE_NUMEL // max(1, codes.shape[1]))
    factor = (absmax / INT8_MAX).unsqueeze(1)  # [N, 1]
    for first in range(0, codes.shape[0], step):
        values[first : first + step] = codes[first : first + step].float().mul_(factor[first : first + step])
    return values


def split_outliers(x: Tensor, threshold: float, *, whole_columns: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Take the outliers out of activations.

    Args:
        x: ``[N, I]``.
        threshold: magnitude from which a value is an outlier; 0 takes none out, as in bitsandbytes.
        whole_columns: take a feature of all tokens where one token has an outlier in it, as the paper does.
    Returns: ``x`` with zeros where they were; the features that hold outliers, int64 ``[F]``; their values ``[N, F]``,
        zero where a token's is none.
    """
    if threshold <= 0:
        columns = torch.empty(0, dtype=torch.int64, device=x.device)
        return x, columns, x[:, :0]
    outlier = x.abs() >= threshold
    columns = outlier.any(dim=0).nonzero().squeeze(1)
    outliers = x[:, columns]
    if not whole_columns:
        outliers = outliers.masked_fill(~outlier[:, columns], 0)
    return x.masked_fill(outlier, 0), columns, outliers


def linear_int8(
    x: Tensor, codes: Tensor, absmax: Tensor, *, threshold: float = THRESHOLD, whole_columns: bool = False
) -> Tensor:
    """Multiply activations by an 8-bit weight in integers: ``Y = X W^T`` (sections 2 and 3, equation 8).

    Args:
        x: ``[..., I]``, fp16, bf16, fp32 or fp64.
        codes: int8 ``[O, I]``; absmax: fp32 ``[O]``, of the weight.
        threshold, whole_columns: as in `split_outliers`.
    Returns: ``[..., O]`` in the dtype of ``x``, rounded once.
    """
    flat = x.reshape(-1, x.shape[-1])
    inliers, columns, outliers = split_outliers(flat, threshold, whole_columns=whole_columns)
    x_codes, x_absmax = quantize_vectors(inliers)
    if whole_columns:
        x_codes[:, columns] = 0
    product = x_codes.double() @ codes.double().t()  # exact: integers below 2^53
    y = scale_product(product.float(), x_absmax, absmax)
    if columns.numel():
        y += outliers.float() @ dequantize_vectors(codes[:, columns], absmax, dtype=torch.float32).t()
    return y.to(x.dtype).view(*x.shape[:-1], codes.shape[0])


def scale_product(product: Tensor, x_absmax: Tensor, absmax: Tensor) -> Tensor:
    """Give a product of codes its scale, in place: ``[N, O]`` fp32 times both constants over 127."""
    return product.mul_((x_absmax / INT8_MAX).unsqueeze(1)).mul_((absmax / INT8_MAX).unsqueeze(0))
