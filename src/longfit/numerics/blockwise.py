"""Block-wise quantisation: each value becomes the code of its nearest level (QLoRA, section 2).

    absmax[b] = max |x| over the block                                      fp32
    s         = clamp(x * (1 / max(absmax, 1e-38)), -1, 1)                  fp32, reciprocal first, then the product
    code      = number of thresholds strictly below s                       thresholds: midpoints of neighbouring levels
    x'        = level[code] * absmax                                        fp32, rounded once to the target dtype

Two rules make the codes reproducible bit by bit on any machine: the order of the fp32 operations above, and that a
value exactly on a threshold goes to the lower level. A codebook in any order is sorted and the rank mapped back.

Defined corners: the last block may be short. A block of zeros has absmax 0 and the code of level 0 (NF4: 7). A block
with a NaN or an infinity has absmax NaN and the code of the highest level throughout, and decodes to NaN; other blocks
are as if it were not there. fp64 is rounded to fp32 first.

Nothing here knows of double quantisation or of weights; `quant_state.py` puts the pieces together.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from longfit.numerics.absmax import block_absmax, check_absmax, check_block_size, flatten_floats, in_blocks, num_blocks

# Values handled at once: 4 MiB per fp32 temporary, so that a huge embedding needs no more scratch than a small layer.
SLICE_NUMEL = 1 << 20

# The reciprocal of anything smaller overflows fp32; the constant belongs to the format.
SMALLEST_ABSMAX = 1e-38


def quantize_blockwise(values: Tensor, codebook: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Round each value to its nearest level, scaled by its block's absmax.

    Args:
        values: any shape, fp16, bf16, fp32 or fp64; blocks run over the flattened tensor.
        codebook: fp32 ``[2..256]`` levels in any order.
        block_size: values per absmax.
    Returns: codes uint8 ``[numel]``; absmax fp32 ``[ceil(numel / block_size)]``.
    Raises: TypeError: not a float tensor. ValueError: bad ``block_size`` or codebook.
    """
    flat = flatten_floats(values)
    check_block_size(block_size)
    between, code_of_rank = thresholds(codebook, flat.device)
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(num_blocks(flat.numel(), block_size), dtype=torch.float32, device=flat.device)
    for run, constants in block_slices(flat.numel(), block_size):
        blocks = in_blocks(flat[run], block_size)  # [blocks, block_size]
        absmax[constants] = block_absmax(blocks)
        blocks *= absmax[constants].clamp(min=SMALLEST_ABSMAX).reciprocal().unsqueeze(1)
        ranks = torch.bucketize(blocks.clamp_(-1, 1).view(-1), between, out_int32=True)
        codes[run] = code_of_rank.index_select(0, ranks)[: run.stop - run.start]
    return codes, absmax


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, codebook: Tensor, *, block_size: int, dtype: torch.dtype
) -> Tensor:
    """Look up each code's level and scale it by its block's absmax.

    Args:
        codes: uint8, any shape.
        absmax: fp32 ``[ceil(numel / block_size)]``.
        codebook: the fp32 levels, in the order the codes count in.
        block_size: values per absmax.
        dtype: type of the result; the fp32 product is rounded to it once.
    Returns: ``[numel]`` in ``dtype``.
    Raises: ValueError: ``absmax`` does not have one value per block.
    """
    flat = codes.reshape(-1)
    check_absmax(absmax, flat.numel(), check_block_size(block_size))
    levels = codebook.to(flat.device)
    values = torch.empty(flat.numel(), dtype=dtype, device=flat.device)
    for run, constants in block_slices(flat.numel(), block_size):
        blocks = in_blocks(levels.index_select(0, flat[run].int()), block_size)
        blocks *= absmax[constants].unsqueeze(1)
        values[run] = blocks.view(-1)[: run.stop - run.start]
    return values


def nearest_codes(values: Tensor, codebook: Tensor) -> Tensor:
    """Return the code of each value's nearest level; on a tie that of the lower level; for NaN that of the highest.

    Args:
        values: fp32, any shape, already scaled to the codebook's range.
        codebook: fp32 ``[2..256]`` levels in any order.
    Returns: uint8 of the shape of ``values``.
    """
    between, code_of_rank = thresholds(codebook, values.device)
    return code_of_rank[torch.bucketize(values, between)]


def thresholds(codebook: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sort a codebook's levels and put a threshold between neighbours.

    Args:
        codebook: fp32 ``[2..256]`` levels in any order.
        device: of the result.
    Returns: fp32 midpoints between ascending levels ``[n - 1]``; the code of each of those levels, uint8 ``[n]``.
    Raises: ValueError: bad codebook.
    """
    if codebook.dtype != torch.float32 or codebook.dim() != 1 or not 2 <= codebook.numel() <= 256:
        raise ValueError(f"codebook: got {codebook.dtype} {list(codebook.shape)}; allowed: float32 [2] to [256]")
    if bool(codebook.isnan().any()):
        raise ValueError("codebook: holds NaN, which is nearest to nothing; leave those levels out")
    levels, order = codebook.to(device).sort(stable=True)  # stable: of FP4's two zeros, code 0 comes before code 8
    return (levels[:-1] + levels[1:]) / 2, order.to(torch.uint8)


def block_slices(numel: int, block_size: int) -> Iterator[tuple[slice, slice]]:
    """Cut ``numel`` values into runs of whole blocks, about `SLICE_NUMEL` values each.

    Yields: the run's slice of the values, and its slice of the block constants.
    """
    step = max(1, SLICE_NUMEL // block_size)
    for first in range(0, num_blocks(numel, block_size), step):
        stop = min((first + step) * block_size, numel)
        yield slice(first * block_size, stop), slice(first, num_blocks(stop, block_size))


def pack_nibbles(codes: Tensor, *, fill: int = 0) -> Tensor:
    """Put two 4-bit codes in a byte, the even one in the high half.

    Args:
        codes: uint8 ``[n]``, each below 16.
        fill: the code that completes the last byte when n is odd.
    Returns: uint8 ``[(n + 1) // 2]``.
    """
    high, low = codes[0::2], codes[1::2]
    if codes.numel() % 2:
        low = torch.cat([low, low.new_full((1,), fill)])
    return high << 4 | low


def unpack_nibbles(packed: Tensor, num_codes: int) -> Tensor:
    """Undo `pack_nibbles`.

    Args:
        packed: uint8 ``[(num_codes + 1) // 2]``.
        num_codes: how many codes to return.
    Returns: uint8 ``[num_codes]``.
    Raises: ValueError: ``packed`` has another length.
    """
    if packed.dtype != torch.uint8 or packed.shape != ((num_codes + 1) // 2,):
        raise ValueError(
            f"packed: got {packed.dtype} {list(packed.shape)}; {num_codes} codes need uint8 [{(num_codes + 1) // 2}]"
        )
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:num_codes]
