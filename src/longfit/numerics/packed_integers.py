"""Integers of few bits in 32-bit words, with a scale and a zero for each group: how GPTQ, AWQ and compressed-tensors
store a weight.

    W[o, i] = (code[o, i] - zero[o, g]) * scale[o, g]        g the group of input i

    format             words run over  element i of a word        zeros                        groups
    GPTQ               inputs          bits i b .. (i + 1) b - 1  z - 1 (v2: z), over outputs  listed, or runs of inputs
    AWQ                outputs         order 0 2 4 6 1 3 5 7      z, over outputs              runs of inputs
    compressed-tensors inputs          bits i b .. (i + 1) b - 1  over outputs, or the middle  listed, or runs of inputs

Words of 3 bits run on: an element may begin in one word and end in the next. Nothing here quantises: these formats are
read, and what they hold is turned into another.

Sources: Frantar et al., "GPTQ", 2022, and AutoGPTQ's ``QuantLinear.pack``; Lin et al., "AWQ", 2023, and AutoAWQ's
``WQLinear_GEMM.from_linear``; compressed-tensors' ``pack_to_int32``.
"""

import torch
from torch import Tensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight outputs lies in its word."""


def unpack_integers(words: Tensor, *, bits: int, count: int) -> Tensor:
    """Take unsigned integers out of the words of each row, lowest bits first.

    Args:
        words: int32 ``[N, ceil(count bits / 32)]``.
        bits: of an integer, 1 to 8.
        count: integers in a row.
    Returns: uint8 ``[N, count]``.
    Raises: ValueError: too few words for ``count``.
    """
    if words.shape[1] * 32 < count * bits:
        raise ValueError(f"{count} integers of {bits} bits need {-(-count * bits // 32)} words, got {words.shape[1]}")
    octets = words.contiguous().view(torch.uint8).view(len(words), -1)  # [N, 4 W], little-endian
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        parts = [(octets >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).view(len(words), -1)[:, :count]
    first = torch.arange(count, device=words.device) * bits
    padded = torch.nn.functional.pad(octets, (0, 1)).to(torch.int32)  # an integer may end in the next octet
    both = padded[:, first // 8] | (padded[:, first // 8 + 1] << 8)
    return ((both >> (first % 8).to(torch.int32)) & mask).to(torch.uint8)


def dequantize_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: Tensor, *, bits: int, zeros_from_one: bool = True
) -> Tensor:
    """De-quantise a weight as GPTQ's tools store it.

    Args:
        qweight: int32 ``[I bits / 32, O]``.
        qzeros: int32 ``[G, O bits / 32]``.
        scales: ``[G, O]``.
        groups: int ``[I]``, each input's group (``g_idx``).
        bits: of a code: 2, 3, 4 or 8.
        zeros_from_one: zeros are stored as one less than they are (version 1 of the format).
    Returns: fp32 ``[O, I]``.
    Raises: ValueError: a stored zero of all ones in version 1: some tools read it as 0, some as one beyond all codes.
    """
    codes = unpack_integers(qweight.t(), bits=bits, count=len(groups))
    zeros = unpack_integers(qzeros, bits=bits, count=scales.shape[1])
    if zeros_from_one:
        largest = (1 << bits) - 1
        if bool((zeros == largest).any()):
            raise ValueError(f"a stored zero of {largest}: tools disagree whether it is 0 or {largest + 1}")
        zeros = zeros + 1
    return _grouped(codes, zeros.t(), scales.t(), groups)


def dequantize_awq(qweight: Tensor, qzeros: Tensor | None, scales: Tensor, groups: Tensor) -> Tensor:
    """De-quantise a weight as AWQ stores it, in 4 bits, in the arrangement named ``gemm``.

    Args:
        qweight: int32 ``[I, O / 8]``.
        qzeros: int32 ``[G, O / 8]``.
        scales: ``[G, O]``.
        groups: int ``[I]``, each input's group.
    Returns: fp32 ``[O, I]``.
    """
    zeros = torch.full_like(scales, 8, dtype=torch.uint8) if qzeros is None else _awq_codes(qzeros)
    return _grouped(_awq_codes(qweight).t(), zeros.t(), scales.t(), groups)


def _awq_codes(words: Tensor) -> Tensor:
    codes = unpack_integers(words, bits=4, count=8 * words.shape[1])
    return codes.view(len(words), -1, 8)[:, :, list(AWQ_ORDER)].reshape(len(words), -1)


def dequantize_pack_quantized(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, groups: Tensor, *, bits: int
) -> Tensor:
    """De-quantise a weight as compressed-tensors stores it under the name ``pack-quantized``.

    Args:
        packed: int32 ``[O, ceil(I bits / 32)]``; codes lie around zero and are stored with half their range added.
        scale: ``[O, G]``.
        zero_point: int32 ``[ceil(O bits / 32), G]``, packed over outputs likewise; None where codes are symmetric.
        groups: int ``[I]``, each input's group.
        bits: of a code.
    Returns: fp32 ``[O, I]``.
    """
    codes = unpack_integers(packed, bits=bits, count=len(groups))
    if zero_point is None:
        zeros = torch.full_like(scale, 1 << (bits - 1), dtype=torch.uint8)
    else:
        zeros = unpack_integers(zero_point.t(), bits=bits, count=len(scale)).t()  # the added halves cancel
    return _grouped(codes, zeros, scale, groups)


def runs_of(group_size: int, num_inputs: int, *, device: torch.device | None = None) -> Tensor:
    """Each input's group where groups are runs of inputs; ``group_size`` -1 is one group for all."""
    size = num_inputs if group_size == -1 else group_size
    return torch.arange(num_inputs, device=device) // size


def _grouped(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """``(codes - zeros) * scales`` in fp32: codes ``[O, I]``, the others ``[O, G]``."""
    groups = groups.long()
    weight = codes.float()
    weight -= zeros.float()[:, groups]
    weight *= scales.float()[:, groups]
    return weight
