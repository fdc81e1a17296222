"""Absmax quantisation: divide by the largest magnitude, round to an integer (QLoRA, section 2, equations 1 and 2).

    codes = round(c * X)          c = 127 / absmax(X)
    X'    = codes / c             |X - X'| <= absmax / 254, plus fp32 rounding

One outlier costs every value of its tensor precision, because all of them share one absmax. Cutting the flattened
tensor into blocks, each with its own absmax, keeps the harm of an outlier inside its block. Both forms are here;
`blockwise.py` replaces the integer grid by any codebook and takes `block_absmax` from this file.

This is neither the storage of the frozen base (that is NF4, `quant_state.py`) nor LLM.int8's row-and-column scaling.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_MAX = 127  # symmetric: -128 is never written, so the code of -x is minus the code of x

# 127 / 1e-36 is finite in fp32. A smaller absmax counts as 1e-36, and the rounding error stays below 4e-39.
_SMALLEST_ABSMAX = 1e-36


def quantize_int8(values: Tensor, *, block_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Round values to 8-bit integers scaled by their absmax (QLoRA, equation 1; block by block as in its section 2).

    Arithmetic is fp32. Zeros have absmax 0 and codes 0. A block with a NaN or an infinity has absmax NaN and codes 0,
    and decodes to NaN as a whole.

    Args:
        values: any shape, fp16, bf16, fp32 or fp64.
        block_size: values per absmax over the flattened tensor; None is one absmax for all.
    Returns: codes int8 of the shape of ``values``, in -127..127; absmax fp32 ``[ceil(numel / block_size)]``.
    Raises: TypeError: not a float tensor. ValueError: ``block_size`` below 1.
    """
    flat = flatten_floats(values)
    block_size = max(1, flat.numel()) if block_size is None else check_block_size(block_size)
    blocks = in_blocks(flat, block_size)  # [num_blocks, block_size]
    absmax = block_absmax(blocks)
    codes = (blocks * _int8_factor(absmax)).nan_to_num(0.0).round().to(torch.int8)
    return codes.view(-1)[: flat.numel()].view(values.shape), absmax


def dequantize_int8(codes: Tensor, absmax: Tensor, *, block_size: int | None = None, dtype: torch.dtype) -> Tensor:
    """Turn 8-bit codes back into values (QLoRA, equation 2): ``codes / c`` in fp32, rounded once to ``dtype``.

    Args:
        codes: int8, any shape.
        absmax: fp32 ``[ceil(numel / block_size)]``, as `quantize_int8` returned it.
        block_size: as given to `quantize_int8`.
        dtype: float type of the result.
    Returns: values of the shape of ``codes`` in ``dtype``.
    Raises: ValueError: ``absmax`` does not have one value per block.
    """
    flat = codes.reshape(-1)
    block_size = max(1, flat.numel()) if block_size is None else check_block_size(block_size)
    check_absmax(absmax, flat.numel(), block_size)
    limit = absmax.unsqueeze(1)  # 127 / c can round above absmax, and at fp32's largest value to infinity
    values = (in_blocks(flat, block_size) / _int8_factor(absmax)).clamp(-limit, limit)
    return values.to(dtype).view(-1)[: flat.numel()].view(codes.shape)


def _int8_factor(absmax: Tensor) -> Tensor:
    return (INT8_MAX / absmax.clamp(min=_SMALLEST_ABSMAX)).unsqueeze(1)  # [num_blocks, 1], the paper's c


def flatten_floats(values: Tensor) -> Tensor:
    """Return ``values`` as a detached 1-D tensor of its own dtype, refusing anything but real floats.

    Args:
        values: any shape, any strides, fp16, bf16, fp32 or fp64.
    Returns: ``[numel]``; a view where the strides allow it.
    Raises: TypeError: integer, bool, complex or 8-bit float values.
    """
    if values.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"values: got {values.dtype}; allowed: float16, bfloat16, float32, float64; convert them first")
    return values.detach().reshape(-1)


def in_blocks(flat: Tensor, block_size: int) -> Tensor:
    """Copy ``[numel]`` values to fp32 ``[num_blocks, block_size]``, the last block filled up with zeros."""
    return F.pad(flat.float(), (0, -flat.numel() % block_size)).view(-1, block_size)


def block_absmax(blocks: Tensor) -> Tensor:
    """Return the largest magnitude of each block; NaN for a block that holds a NaN or an infinity.

    With an infinite absmax a block would decode to NaN mixed with infinities of the wrong sign. One NaN for the whole
    block says plainly that it is lost, and no other block is touched.

    Args:
        blocks: fp32 ``[num_blocks, block_size]``.
    Returns: fp32 ``[num_blocks]``.
    """
    absmax = blocks.abs().amax(dim=1)
    return absmax.masked_fill(absmax.isinf(), float("nan"))


def num_blocks(numel: int, block_size: int) -> int:
    """Return how many blocks ``numel`` values fill; the last one may be short."""
    return -(-numel // block_size)


def check_block_size(block_size: int) -> int:
    """Return ``block_size``; raise ValueError unless it is an int of at least 1."""
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
        raise ValueError(f"block_size: got {block_size!r}; allowed: an int of at least 1; try block_size=64")
    return block_size


def check_absmax(absmax: Tensor, numel: int, block_size: int) -> None:
    """Raise ValueError unless ``absmax`` is fp32 and has one value per block of ``numel`` values."""
    expected = num_blocks(numel, block_size)
    if absmax.dtype != torch.float32 or absmax.shape != (expected,):
        raise ValueError(
            f"absmax: got {absmax.dtype} {list(absmax.shape)}, but {numel} values in blocks of {block_size} "
            f"need float32 [{expected}]; pass the absmax and the block_size of the same quantisation"
        )
