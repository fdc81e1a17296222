"""Formats in which a checkpoint may be quantised already, and the dense weight that each of them stands for.

    fp8                    weight, weight_scale_inv              blocks of 128 x 128 (DeepSeek, Qwen), or one scale
    mxfp4                  X_blocks, X_scales                    stacked experts of gpt-oss
    gptq                   qweight, qzeros, scales, g_idx        2, 3, 4 or 8 bits
    awq                    qweight, qzeros, scales               4 bits, the arrangement "gemm"
    compressed-tensors     weight_packed, weight_scale, ...      pack-quantized, 4 or 8 bits; float-quantized

A format is here only if its de-quantisation is checked against transformers' or the format's own tools
(``tests/model/test_stored_formats.py``); all others are refused by name. Its settings are read in full: one that is not
known would make another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from longfit.errors import ModelError
from longfit.numerics.fp8_blocks import dequantize_fp8_blocks
from longfit.numerics.microscaling import dequantize_mxfp4_experts
from longfit.numerics.packed_integers import dequantize_awq, dequantize_gptq, dequantize_pack_quantized, runs_of

Shape = tuple[int, ...]
Parts = Mapping[str, Tensor]
INT32_BITS = 32


class StoredParts(Protocol):
    """The parts of one weight, before they are read."""

    def shape(self, part: str) -> Shape:
        """Of a part, from its file's header."""

    def value(self, part: str) -> Tensor:
        """A part, read."""


@dataclass(frozen=True)
class Stored:
    """How one kind of weight lies in a checkpoint.

    Attributes:
        parts: endings of the tensors that stand for a weight, the one that must be there first.
        ending: what takes their place in the dense weight's name.
        shape: the dense shape, from what is known of the parts before they are read.
        rows: part of the dense weight, fp32, from the parts: from row to row of its first dimension.
        step: rows that can be taken apart from others: a multiple of it.
        optional: parts that may be missing.
        unused: endings beside them that only a kernel reads which quantises activations too.
    """

    parts: tuple[str, ...]
    ending: str
    shape: Callable[[StoredParts], Shape]
    rows: Callable[[Parts, int, int], Tensor]
    step: int
    optional: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredFormat:
    """A format with its settings.

    Attributes:
        words: what it is, for people.
        kinds: how its weights lie in files; the first whose first part is there is meant.
        note: what is not reproduced; "" if all is.
    """

    words: str
    kinds: tuple[Stored, ...]
    note: str = ""


def stored_format(name: str, block: Mapping[str, Any]) -> StoredFormat:
    """The format that a ``quantization_config`` describes.

    Args:
        name: of the model, for messages.
        block: as ``config.json`` has it.
    Raises: ModelError: a format or setting that is not known in full.
    """
    method = block.get("quant_method")
    made = FORMATS.get(str(method))
    if made is None:
        raise ModelError(
            f"{name}: quantised with {method!r}; longfit reads dense checkpoints, bitsandbytes ones and those in "
            f"{', '.join(FORMATS)}: use the original model"
        )
    try:
        return made(block)
    except UnknownSettingError as error:
        raise ModelError(f"{name}: quantised with {method!r}, {error}; use the original model") from error


class UnknownSettingError(ValueError):
    """A setting of a format that this module does not know how to follow."""


def _require(block: Mapping[str, Any], key: str, allowed: tuple[Any, ...], *, default: Any) -> Any:
    value = block.get(key, default)
    value = value.lower() if isinstance(value, str) else value
    if value not in allowed:
        raise UnknownSettingError(
            f"{key}={block.get(key)!r}: longfit reads {', '.join(str(each) for each in allowed if each is not None)}"
        )
    return value


# ------------------------------------------------------------------------------------------------ FP8
def _fp8(block: Mapping[str, Any]) -> StoredFormat:
    _require(block, "fmt", ("e4m3", "float8_e4m3fn", None), default=None)
    sizes = block.get("weight_block_size", (128, 128))
    if sizes is not None and (len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes)):
        raise UnknownSettingError(f"weight_block_size={sizes!r}: must be two numbers")
    blocks = None if sizes is None else (sizes[0], sizes[1])
    words = "FP8, one scale a weight" if blocks is None else f"FP8 in blocks of {blocks[0]} x {blocks[1]}"
    return StoredFormat(words, (fp8_kind("_scale_inv", blocks, unused=(".activation_scale", ".input_scale")),))


def fp8_kind(scale: str, blocks: tuple[int, int] | None, *, unused: tuple[str, ...] = ()) -> Stored:
    """Weights ``X`` beside their scales ``X + scale``; stacked experts too."""

    def rows(parts: Parts, start: int, stop: int) -> Tensor:
        weight, scales = parts[""], parts[scale]
        if weight.dim() == 2 and blocks is not None:
            scales = scales[start // blocks[0] : -(-stop // blocks[0])]
        elif scales.numel() > 1:
            scales = scales[start:stop]
        return dequantize_fp8_blocks(weight[start:stop], scales, block=blocks)

    step = blocks[0] if blocks is not None else 1
    return Stored((scale, ""), "", lambda parts: parts.shape(""), rows, step, unused=unused)


# ------------------------------------------------------------------------------------------------ MXFP4
def _mxfp4_shape(parts: StoredParts) -> Shape:
    num_experts, outputs, blocks, octets = parts.shape("_blocks")
    return num_experts, 2 * octets * blocks, outputs


def _mxfp4(block: Mapping[str, Any]) -> StoredFormat:
    kind = Stored(
        parts=("_blocks", "_scales"),
        ending="",
        shape=_mxfp4_shape,
        rows=lambda parts, start, stop: dequantize_mxfp4_experts(
            parts["_blocks"][start:stop], parts["_scales"][start:stop]
        ),
        step=1,
    )
    return StoredFormat("MXFP4, blocks of 32", (kind,))


# ------------------------------------------------------------------------------------------------ GPTQ and AWQ
QWEIGHT, QZEROS, SCALES, G_IDX = ".qweight", ".qzeros", ".scales", ".g_idx"


def _gptq(block: Mapping[str, Any]) -> StoredFormat:
    bits = _require(block, "bits", (2, 3, 4, 8), default=None)
    written = block.get("checkpoint_format") or block.get("format") or "gptq"
    if str(written).lower() not in ("gptq", "gptq_v2") or block.get("is_marlin_format"):
        raise UnknownSettingError(f"format {written!r}: longfit reads gptq and gptq_v2")
    if block.get("dynamic"):
        raise UnknownSettingError("dynamic: layers of different settings")
    _require(block, "pack_dtype", ("int32", None), default=None)
    size, from_one = _group_size(block), str(written).lower() == "gptq"

    def shape(parts: StoredParts) -> Shape:
        words, outputs = parts.shape(QWEIGHT)
        return outputs, words * INT32_BITS // bits

    def rows(parts: Parts, start: int, stop: int) -> Tensor:
        qweight = parts[QWEIGHT][:, start:stop]
        qzeros = parts[QZEROS][:, start * bits // INT32_BITS : -(-stop * bits // INT32_BITS)]
        groups = parts.get(G_IDX)
        if groups is None:
            groups = runs_of(size, qweight.shape[0] * INT32_BITS // bits)
        scales = parts[SCALES][:, start:stop]
        return dequantize_gptq(qweight, qzeros, scales, groups, bits=bits, zeros_from_one=from_one)

    kind = Stored((QWEIGHT, QZEROS, SCALES, G_IDX), ".weight", shape, rows, INT32_BITS, optional=(G_IDX,))
    return StoredFormat(f"GPTQ, {bits} bits, {_groups(size)}", (kind,))


def _awq(block: Mapping[str, Any]) -> StoredFormat:
    _require(block, "bits", (4,), default=block.get("w_bit"))
    _require(block, "version", ("gemm",), default=block.get("format") or "gemm")
    _require(block, "backend", ("autoawq", "auto", "gemm", None), default=None)
    size = _group_size(block)

    def rows(parts: Parts, start: int, stop: int) -> Tensor:
        words = slice(start // 8, -(-stop // 8))
        qzeros, groups = parts.get(QZEROS), runs_of(size, len(parts[QWEIGHT]))
        return dequantize_awq(
            parts[QWEIGHT][:, words], None if qzeros is None else qzeros[:, words], parts[SCALES][:, start:stop], groups
        )

    def shape(parts: StoredParts) -> Shape:
        inputs, words = parts.shape(QWEIGHT)
        return 8 * words, inputs

    zeros = (QZEROS,) if block.get("zero_point") is False else ()
    kind = Stored((QWEIGHT, QZEROS, SCALES), ".weight", shape, rows, 8, optional=zeros)
    return StoredFormat(f"AWQ, 4 bits, {_groups(size)}", (kind,))


def _group_size(block: Mapping[str, Any]) -> int:
    size = block.get("group_size", block.get("q_group_size"))
    if not isinstance(size, int) or size == 0 or size < -1:
        raise UnknownSettingError(f"group_size={size!r}: must be a number of inputs, or -1")
    return size


def _groups(size: int) -> str:
    return "one group a row" if size == -1 else f"groups of {size}"


# ------------------------------------------------------------------------------------------------ compressed-tensors
PACKED, SCALE, ZERO, INDEX, SHAPE = (f".weight_{part}" for part in ("packed", "scale", "zero_point", "g_idx", "shape"))
UNUSED = (".input_scale", ".input_zero_point", ".input_global_scale")


def _compressed_tensors(block: Mapping[str, Any]) -> StoredFormat:
    _require(block, "quantization_status", ("compressed", None), default=None)
    sparsity = (block.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise UnknownSettingError(f"sparsity_config.format={sparsity!r}")
    if (block.get("transform_config") or {}).get("config_groups"):
        raise UnknownSettingError("transform_config: weights that are rotated")
    if block.get("kv_cache_scheme") is not None:
        raise UnknownSettingError("kv_cache_scheme: keys and values that are rounded")
    groups = [group for group in (block.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    if not groups:
        raise UnknownSettingError("no config_groups")
    kinds: dict[str, Stored] = {}
    for group in groups:
        written, weights = group.get("format") or block.get("format"), group.get("weights") or {}
        if written == "pack-quantized":
            kind, said = _pack_quantized(weights)
        elif written in ("float-quantized", "naive-quantized") and weights.get("type") == "float":
            kind, said = _float_quantized(weights)
        else:
            raise UnknownSettingError(f"format {written!r}: longfit reads pack-quantized and float-quantized")
        kinds.setdefault(said, kind)
    if len({kind.parts for kind in kinds.values()}) < len(kinds):
        raise UnknownSettingError(f"layers of different settings ({'; '.join(kinds)})")
    rounded = any(group.get("input_activations") is not None for group in groups)
    note = "activations, which its kernels round too, are not rounded" if rounded else ""
    return StoredFormat(f"compressed-tensors, {' and '.join(kinds)}", tuple(kinds.values()), note)


def _pack_quantized(weights: Mapping[str, Any]) -> tuple[Stored, str]:
    bits = _require(weights, "num_bits", (4, 8), default=None)
    _require(weights, "type", ("int",), default="int")
    strategy = _require(weights, "strategy", ("group", "channel"), default="group")
    size = -1 if strategy == "channel" else _group_size(weights)
    symmetric = bool(weights.get("symmetric", True))

    def rows(parts: Parts, start: int, stop: int) -> Tensor:
        words = slice(start * bits // INT32_BITS, -(-stop * bits // INT32_BITS))
        zeros = None if symmetric else parts[ZERO][words]
        groups = parts.get(INDEX)
        if groups is None or bool((groups < 0).any()):
            groups = runs_of(size, int(parts[SHAPE][1]))
        return dequantize_pack_quantized(parts[PACKED][start:stop], parts[SCALE][start:stop], zeros, groups, bits=bits)

    kind = Stored(
        parts=(PACKED, SCALE, SHAPE, ZERO, INDEX),
        ending=".weight",
        shape=lambda parts: tuple(int(size) for size in parts.value(SHAPE)),
        rows=rows,
        step=INT32_BITS,
        optional=(INDEX, *((ZERO,) if symmetric else ())),
        unused=UNUSED,
    )
    return kind, f"integers of {bits} bits, {_groups(size)}"


def _float_quantized(weights: Mapping[str, Any]) -> tuple[Stored, str]:
    _require(weights, "num_bits", (8,), default=None)
    _require(weights, "type", ("float",), default=None)
    if not weights.get("symmetric", True):
        raise UnknownSettingError("symmetric=False: floats with a zero point")
    strategy = _require(weights, "strategy", ("channel", "tensor", "block"), default="tensor")
    blocks = None
    if strategy == "block":
        sizes = weights.get("block_structure")
        if not isinstance(sizes, list) or len(sizes) != 2:
            raise UnknownSettingError(f"block_structure={sizes!r}")
        blocks = (int(sizes[0]), int(sizes[1]))
    words = {"channel": "one scale a row", "tensor": "one scale a weight"}
    said = words[strategy] if blocks is None else f"blocks of {blocks[0]} x {blocks[1]}"
    return fp8_kind("_scale", blocks, unused=UNUSED), f"FP8, {said}"


FORMATS: dict[str, Callable[[Mapping[str, Any]], StoredFormat]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
}
