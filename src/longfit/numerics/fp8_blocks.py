"""Weights in 8-bit floats with a scale for each block of rows and columns: how DeepSeek-V3 and Qwen's FP8 models are
stored.

    W[o, i] = e4m3[o, i] * scale_inv[o // 128, i // 128]        fp32; the last blocks may be short

The scale is called an inverse because a kernel that quantises multiplies by its reciprocal; here it multiplies. One
scale for a whole weight, or for each of its rows, is the same with larger blocks.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 3.3, and its ``weight_dequant``.
"""

import torch
from torch import Tensor


def dequantize_fp8_blocks(weight: Tensor, scale: Tensor, *, block: tuple[int, int] | None) -> Tensor:
    """Multiply each block by its scale.

    Args:
        weight: float8 ``[..., O, I]``.
        scale: any float, ``[..., ceil(O / block[0]), ceil(I / block[1])]``; without blocks one number, or ``[O, 1]``.
        block: rows and columns of a block; None where there are no blocks.
    Returns: fp32 ``[..., O, I]``.
    Raises: ValueError: ``scale`` has another shape than ``block`` says.
    """
    scale = scale.float()
    if block is not None:
        rows, columns = weight.shape[-2:]
        expected = (*weight.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
        if tuple(scale.shape) != expected:
            raise ValueError(
                f"scales {list(scale.shape)} of blocks of {block[0]} x {block[1]}: must be {list(expected)}"
            )
        scale = scale.repeat_interleave(block[0], dim=-2)[..., :rows, :]
        scale = scale.repeat_interleave(block[1], dim=-1)[..., :columns]
    elif scale.numel() != 1 and scale.shape != (*weight.shape[:-1], 1):
        raise ValueError(f"scales {list(scale.shape)} without blocks: must be one number, or one a row")
    return weight.to(torch.float32) * scale
