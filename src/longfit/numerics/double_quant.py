"""Double quantisation: the block constants quantised again, 8 bits each (QLoRA, section 3, "Double Quantization").

Blocks of 64 with an fp32 absmax cost 32 / 64 = 0.5 bit per weight. An absmax is positive, so its mean is subtracted
first; what remains is quantised block-wise, 256 constants to a block, and the cost is 8/64 + 32/(64 * 256) = 0.127 bit.

    offset = mean(absmax)                                                          fp32
    codes, nested absmax = quantize_blockwise(absmax - offset, 8-bit codebook)
    absmax' = level[code] * nested absmax + offset                                 two fp32 roundings, never a fused one

A fused multiply-add would change some 6 % of the constants by one unit in the last place, and files would no longer
decode alike everywhere. The mean is torch's own reduction, because its summation order decides the offset's last bit.

The 8-bit codebook is the signed dynamic map, as in every bitsandbytes file; codes are the exact nearest ones. It is not
FP8 E4M3, the type that the paper's text names (docs/decisions/0007).

Corner cases: a constant of 0 (a block of zeros) decodes to something else, which does no harm because all its codes
stand for level 0. One NaN constant makes the offset NaN, and with it the whole tensor: a broken weight stays visible.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longfit.numerics.absmax import check_absmax, check_block_size
from longfit.numerics.blockwise import dequantize_blockwise, quantize_blockwise
from longfit.numerics.codebooks import dynamic_map


@dataclass(frozen=True, eq=False)
class DoubleQuant:
    """Block constants in 8 bits.

    Attributes:
        codes: uint8 ``[num_blocks]``, of `dynamic_map(signed=True)`.
        absmax: fp32 ``[ceil(num_blocks / absmax_block_size)]``, the constants of the constants.
        offset: fp32 ``[]``.
        absmax_block_size: constants per nested absmax.
    Raises: ValueError: wrong dtypes, or a nested absmax that does not fit the codes.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    absmax_block_size: int = 256

    def __post_init__(self) -> None:
        check_absmax(self.absmax, self.codes.numel(), check_block_size(self.absmax_block_size))
        if self.codes.dtype != torch.uint8 or self.offset.dtype != torch.float32 or self.offset.dim() != 0:
            raise ValueError(
                f"double_quant: got codes {self.codes.dtype}, offset {self.offset.dtype} {list(self.offset.shape)}; "
                "needs uint8 and float32 []; do not cast a model's quantised constants"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, the nested absmax and the offset."""
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes

    def to(self, device: torch.device | str) -> "DoubleQuant":
        """Return the same constants on another device."""
        return replace(self, codes=self.codes.to(device), absmax=self.absmax.to(device), offset=self.offset.to(device))


def quantize_absmax(absmax: Tensor, *, absmax_block_size: int = 256) -> DoubleQuant:
    """Quantise block constants to 8 bits (QLoRA, section 3).

    Args:
        absmax: fp32 ``[num_blocks]``.
        absmax_block_size: constants per nested absmax.
    Returns: the constants' codes, nested absmax and offset.
    Raises: ValueError: ``absmax`` is not fp32 and 1-D.
    """
    if absmax.dtype != torch.float32 or absmax.dim() != 1:
        raise ValueError(f"absmax: got {absmax.dtype} {list(absmax.shape)}; allowed: float32 [num_blocks]")
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    codes, nested = quantize_blockwise(absmax - offset, dynamic_map(signed=True), block_size=absmax_block_size)
    return DoubleQuant(codes, nested, offset, absmax_block_size)


def dequantize_absmax(double: DoubleQuant) -> Tensor:
    """Return the block constants, fp32 ``[num_blocks]``."""
    codebook = dynamic_map(signed=True)
    centred = dequantize_blockwise(
        double.codes, double.absmax, codebook, block_size=double.absmax_block_size, dtype=torch.float32
    )
    return centred.add_(double.offset)  # its own rounding: the product above was already rounded to fp32
