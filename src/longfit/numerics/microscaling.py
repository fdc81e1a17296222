"""FP4 with block scales in 8-bit floats: MXFP4 and NVFP4.

    format  element  block  scale of a block                          scale of the tensor          bits
    MXFP4   E2M1     32     E8M0: 2^(floor(log2 absmax) - 2)          none                         4.25
    NVFP4   E2M1     16     E4M3 of absmax / 6 / tensor scale         fp32: absmax / (6 * 448)     4.5

    element: sign, magnitudes 0 .5 1 1.5 2 3 4 6; nearest, ties to the even code, beyond 6 it is 6
    value  = element * block scale * tensor scale                     fp32, rounded once to the target dtype

A power of two as scale is cheap and coarse: between 4 and 8 times it lies a block's largest value, and what is beyond
6 is cut to 6. The finer E4M3 scale of half the block is what NVFP4 pays 0.25 bit for. These are what cards multiply in
4 bits. Nothing here is a storage of a layer: ``evaluation/quant_error.py`` compares them with the types of QLoRA.

Sources: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3 and 6.3; NVIDIA, "Introducing NVFP4", 2025.
Zeros stay zeros. A block with NaN or infinity decodes to NaN (NVFP4: the whole tensor, as its scale is lost).
"""

import torch
from torch import Tensor

from longfit.numerics.absmax import block_absmax, flatten_floats, in_blocks, num_blocks

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by code; bit 3 is the sign."""

LARGEST, LARGEST_EXPONENT = 6.0, 2  # of E2M1: 6 = 1.5 * 2^2
E4M3_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
BLOCK_SIZES = {"mxfp4": 32, "nvfp4": 16}


def quantize_mxfp4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round values to E2M1 with a power of two for each 32 of them (MX 1.0, section 6.3).

    Args:
        values: any shape, fp16, bf16, fp32 or fp64; blocks run over the flattened tensor.
    Returns: codes uint8 ``[numel]``; scales float8_e8m0fnu ``[num_blocks]``, NaN where a block is not finite.
    Raises: TypeError: not a float tensor.
    """
    flat = flatten_floats(values)
    blocks = in_blocks(flat, BLOCK_SIZES["mxfp4"])
    absmax = block_absmax(blocks)
    exponent = torch.frexp(absmax.nan_to_num(0.0)).exponent - 1 - LARGEST_EXPONENT  # absmax = m 2^e, m in [1/2, 1)
    scale = torch.ldexp(torch.ones_like(absmax), exponent.clamp(-126, 127))  # 2^-127 is subnormal in fp32
    codes = e2m1_codes(blocks / scale.unsqueeze(1))
    scales = scale.masked_fill(absmax.isnan(), float("nan")).to(torch.float8_e8m0fnu)
    return codes.view(-1)[: flat.numel()], scales


def dequantize_mxfp4(codes: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Undo `quantize_mxfp4`: ``[numel]`` in ``dtype``."""
    return _scaled(codes, scales.float(), BLOCK_SIZES["mxfp4"], dtype)


def dequantize_mxfp4_experts(blocks: Tensor, scales: Tensor) -> Tensor:
    """Take stacked experts out of a checkpoint in MXFP4 (gpt-oss).

    Args:
        blocks: uint8 ``[E, O, G, 16]``, two codes an octet, the low half first.
        scales: uint8 ``[E, O, G]``, the exponent of each block of 32 inputs, and 127.
    Returns: fp32 ``[E, I, O]``, as transformers keeps those experts.
    """
    levels = torch.tensor(E2M1, dtype=torch.float32, device=blocks.device)
    levels = torch.cat([levels, -levels])
    codes = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2)  # [E, O, G, 32]
    weight = torch.ldexp(levels[codes.int()], (scales.int() - 127).unsqueeze(-1))
    return weight.flatten(-2).transpose(1, 2).contiguous()


def quantize_nvfp4(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round values to E2M1 with an E4M3 scale for each 16 of them and an fp32 scale for all.

    Args:
        values: any shape, fp16, bf16, fp32 or fp64; blocks run over the flattened tensor.
    Returns: codes uint8 ``[numel]``; scales float8_e4m3fn ``[num_blocks]``; the tensor's scale fp32 ``[]``.
    Raises: TypeError: not a float tensor.
    """
    flat = flatten_floats(values)
    blocks = in_blocks(flat, BLOCK_SIZES["nvfp4"])
    absmax = block_absmax(blocks)  # [num_blocks]
    largest = absmax.max() if absmax.numel() else absmax.new_zeros(())
    tensor_scale = largest / (LARGEST * E4M3_LARGEST)
    divisor = torch.where(tensor_scale > 0, tensor_scale, torch.ones_like(tensor_scale))
    scales = (absmax / LARGEST / divisor).clamp(max=E4M3_LARGEST).to(torch.float8_e4m3fn)
    scale = scales.float() * tensor_scale
    # A block far below the tensor's largest value can have scale 0: all of it is 0 then.
    codes = e2m1_codes(torch.where(scale.unsqueeze(1) > 0, blocks / scale.unsqueeze(1), torch.zeros_like(blocks)))
    return codes.view(-1)[: flat.numel()], scales, tensor_scale


def dequantize_nvfp4(codes: Tensor, scales: Tensor, tensor_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Undo `quantize_nvfp4`: ``[numel]`` in ``dtype``."""
    return _scaled(codes, scales.float() * tensor_scale, BLOCK_SIZES["nvfp4"], dtype)


def e2m1_codes(values: Tensor) -> Tensor:
    """Return the code of the nearest E2M1 value, uint8 of the shape of ``values``: ties to even, beyond 6 it is 6."""
    levels = torch.tensor(E2M1, dtype=torch.float32, device=values.device)
    between = (levels[:-1] + levels[1:]) / 2
    magnitude = values.float().abs().nan_to_num(0.0, posinf=LARGEST)
    lower, upper = (torch.bucketize(magnitude, between, right=right, out_int32=True) for right in (False, True))
    code = torch.where(lower % 2 == 0, lower, upper)  # they differ on a tie only, and there one of the two is even
    return (code + 8 * values.signbit().to(torch.int32)).to(torch.uint8)


def _scaled(codes: Tensor, scales: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    if scales.shape != (num_blocks(codes.numel(), block_size),):
        raise ValueError(
            f"scales: got {list(scales.shape)}; {codes.numel()} values in blocks of {block_size} need "
            f"[{num_blocks(codes.numel(), block_size)}]"
        )
    magnitudes = torch.tensor(E2M1, dtype=torch.float32, device=codes.device)
    levels = torch.cat([magnitudes, -magnitudes])
    blocks = in_blocks(levels[codes.int()], block_size) * scales.unsqueeze(1)
    return blocks.view(-1)[: codes.numel()].to(dtype)
