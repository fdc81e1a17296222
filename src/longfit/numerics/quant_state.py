"""A 4-bit weight: its packed codes, and the state that de-quantising them needs (QLoRA, section 3).

    packed, state = quantize_4bit(weight, quant_type="nf4", block_size=64, double_quant=True)
    weight' = dequantize_4bit(packed, state)

This joins the pieces of the neighbouring files: nearest codes per block, two codes a byte, 8-bit block constants. Per
weight that is 4 bits of code and 0.5 bit of constants, 0.127 bit with double quantisation. The packed bytes and the
constants are those of bitsandbytes; `bitsandbytes_format.py` names them as checkpoints do, `row_format.py` lays them
out row by row.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longfit.numerics.absmax import check_absmax, flatten_floats, num_blocks
from longfit.numerics.blockwise import (
    block_slices,
    dequantize_blockwise,
    nearest_codes,
    pack_nibbles,
    quantize_blockwise,
    unpack_nibbles,
)
from longfit.numerics.codebooks import QUANT_TYPES, codebook
from longfit.numerics.double_quant import DoubleQuant, dequantize_absmax, quantize_absmax

# Powers of two, so that a block is a whole number of bytes and vector registers; bitsandbytes reads these sizes.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, eq=False)
class QuantState:
    """All that de-quantising packed 4-bit codes needs.

    Attributes:
        quant_type: "nf4", "fp4" or "int4".
        block_size: weights per absmax, over the flattened weight.
        shape: of the weight.
        dtype: of the weight that was quantised, and of what `dequantize_4bit` returns unless told otherwise.
        absmax: fp32 ``[num_blocks]``, or a `DoubleQuant` of it.
    Raises: ValueError: unknown type, block size that is not allowed, or constants that do not fit the shape.
    """

    quant_type: str
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    absmax: Tensor | DoubleQuant

    def __post_init__(self) -> None:
        check_format(self.quant_type, self.block_size)
        if not isinstance(self.absmax, DoubleQuant):
            check_absmax(self.absmax, self.numel, self.block_size)
        elif self.absmax.codes.shape != (self.num_blocks,):
            raise ValueError(
                f"absmax: got {list(self.absmax.codes.shape)} codes; shape {list(self.shape)} in blocks of "
                f"{self.block_size} needs [{self.num_blocks}]"
            )

    @property
    def numel(self) -> int:
        """Weights."""
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        """Blocks, of which the last may be short."""
        return num_blocks(self.numel, self.block_size)

    @property
    def double_quant(self) -> bool:
        """Whether the block constants are quantised themselves."""
        return isinstance(self.absmax, DoubleQuant)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and of the constants (the codebooks are shared by all weights and not counted)."""
        return (self.numel + 1) // 2 + self.absmax.nbytes

    @property
    def bits_per_param(self) -> float:
        """Stored bits per weight: 4.5, or 4.127 with double quantisation, for large weights and blocks of 64."""
        return 8 * self.nbytes / self.numel

    def block_absmax(self) -> Tensor:
        """Return the block constants as they enter de-quantisation, fp32 ``[num_blocks]``."""
        return dequantize_absmax(self.absmax) if isinstance(self.absmax, DoubleQuant) else self.absmax

    def to(self, device: torch.device | str) -> "QuantState":
        """Return the same state on another device."""
        return replace(self, absmax=self.absmax.to(device))


def quantize_4bit(
    weight: Tensor,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    absmax_block_size: int = 256,
) -> tuple[Tensor, QuantState]:
    """Quantise a weight to packed 4-bit codes and their state (QLoRA, section 3).

    Args:
        weight: any shape, fp16, bf16, fp32 or fp64.
        quant_type: "nf4", "fp4" or "int4".
        block_size: weights per absmax; a power of two from 32 to 4096. Blocks run over the flattened weight.
        double_quant: quantise the block constants, too.
        absmax_block_size: block constants per nested constant; a power of two from 32 to 4096.
    Returns: packed uint8 ``[(numel + 1) // 2]``; the state.
    Raises: TypeError: not a float tensor. ValueError: unknown type or a size that is not allowed.
    """
    check_format(quant_type, block_size, absmax_block_size)
    flat = flatten_floats(weight)
    levels = codebook(quant_type, device=flat.device)
    fill = int(nearest_codes(levels.new_zeros(()), levels)) if flat.numel() % 2 else 0  # completes the last byte
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(num_blocks(flat.numel(), block_size), dtype=torch.float32, device=flat.device)
    for run, constants in block_slices(flat.numel(), block_size):
        codes, absmax[constants] = quantize_blockwise(flat[run], levels, block_size=block_size)
        packed[_bytes_of(run)] = pack_nibbles(codes, fill=fill)
    stored = quantize_absmax(absmax, absmax_block_size=absmax_block_size) if double_quant else absmax
    return packed, QuantState(quant_type, block_size, tuple(weight.shape), weight.dtype, stored)


def dequantize_4bit(packed: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """Turn packed 4-bit codes back into a weight: fp32 level times fp32 absmax, rounded once to ``dtype``.

    Args:
        packed: uint8 ``[(numel + 1) // 2]``.
        state: as `quantize_4bit` returned it.
        dtype: type of the result; the type the weight had by default.
    Returns: the weight, of shape ``state.shape``.
    Raises: ValueError: ``packed`` does not fit the state.
    """
    dtype = state.dtype if dtype is None else dtype
    if packed.dtype != torch.uint8 or packed.shape != ((state.numel + 1) // 2,):
        raise ValueError(
            f"packed: got {packed.dtype} {list(packed.shape)}; a weight of {list(state.shape)} needs "
            f"uint8 [{(state.numel + 1) // 2}]; view stored bf16 or fp32 as uint8 and flatten it"
        )
    levels, absmax = codebook(state.quant_type, device=packed.device), state.block_absmax()
    weight = torch.empty(state.numel, dtype=dtype, device=packed.device)
    for run, constants in block_slices(state.numel, state.block_size):
        codes = unpack_nibbles(packed[_bytes_of(run)], run.stop - run.start)
        weight[run] = dequantize_blockwise(codes, absmax[constants], levels, block_size=state.block_size, dtype=dtype)
    return weight.view(state.shape)


def check_format(quant_type: str, block_size: int, absmax_block_size: int = 256) -> None:
    """Raise ValueError unless this is a 4-bit format that longfit can write."""
    if quant_type not in QUANT_TYPES:
        raise ValueError(f'quant_type: got {quant_type!r}; allowed: {", ".join(QUANT_TYPES)}; try quant_type="nf4"')
    for name, size, usual in (("block_size", block_size, 64), ("absmax_block_size", absmax_block_size, 256)):
        if size not in BLOCK_SIZES:
            allowed = ", ".join(map(str, BLOCK_SIZES))
            raise ValueError(f"{name}: got {size!r}; allowed: {allowed}; try {name}={usual}")


def _bytes_of(run: slice) -> slice:
    return slice(run.start // 2, (run.stop + 1) // 2)  # runs start at whole blocks, which are whole bytes
