"""Write a merged model as one GGUF file, a tensor at a time, and check it against what was to be written.

The types are those that the ``gguf`` package can write without a compiler. Norms, biases and other vectors stay in
float32, as llama.cpp's own converter has it. In a Q4_0 file embeddings and output matrix are Q8_0: they are read once a
token, and their error goes into every logit. A matrix whose rows are no whole number of blocks is F16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys, LlamaFileType
from torch import Tensor

from longfit.errors import ExportError
from longfit.exporting.gguf_families import GgufFamily, GgufField, to_gguf

FILE_TYPES = {
    "F16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (Type.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q4_0": (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
LEVELS = {"F16": 2**11, "BF16": 2**8, "Q8_0": 127, "Q4_0": 8}
"""Steps of each type below the largest value of those that share them, for ``proof.py``."""
SLICE_ELEMENTS = 1 << 22  # of a tensor that are quantised at a time: 16 MiB of float32
NOT_CARRIED = ("general.file_type", "general.quantization_version", "general.architecture")


def tensor_names(names: Iterable[str], config: Any, family: GgufFamily) -> dict[str, str]:
    """llama.cpp's name of every tensor of the model.

    Raises: ExportError: it has none.
    """
    mapping = gguf.get_tensor_name_map(_architecture(family), config.num_hidden_layers)
    found = {name: mapping.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    missing = [name for name, theirs in found.items() if theirs is None]
    if missing:
        raise ExportError(f"{config.model_type}: llama.cpp has no name for {missing[0]}")
    return {name: str(theirs) for name, theirs in found.items()}


def _architecture(family: GgufFamily) -> Any:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)


def stored_type(name: str, shape: tuple[int, ...], file_type: str) -> Type:
    """The type of a tensor, by llama.cpp's name, in a file."""
    wanted = FILE_TYPES[file_type][0]
    if len(shape) < 2:
        return Type.F32
    if wanted == Type.Q4_0 and name in ("token_embd.weight", "output.weight"):
        wanted = Type.Q8_0
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    return Type.F16 if shape[-1] % block else wanted


class _InFull(np.ndarray):
    """An array that is written in full or raises why not: numpy's own ``tofile`` loses the error of a small one, which
    the C library still holds when it returns, and the reason of a large one."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        fid.write(np.ascontiguousarray(self).data.cast("B"))


def in_full(array: np.ndarray) -> np.ndarray:
    """An array for ``GGUFWriter``, which hands a file to its ``tofile``."""
    return array.view(_InFull)


def encode(tensor: Tensor, kind: Type) -> np.ndarray:
    """A tensor in one of GGUF's types, a slice of rows at a time; ``[..., bytes of a row]`` where it is in blocks."""
    if kind == Type.F32:
        return np.ascontiguousarray(tensor.float().numpy())
    if kind == Type.F16:
        return np.ascontiguousarray(tensor.half().numpy())
    if kind == Type.BF16:
        return tensor.bfloat16().contiguous().view(torch.uint8).numpy()
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, SLICE_ELEMENTS // rows.shape[1])
    parts = [gguf.quantize(rows[i : i + step].float().numpy(), kind) for i in range(0, len(rows), step)]
    return np.concatenate(parts).reshape(*tensor.shape[:-1], -1)


def decode(data: np.ndarray, kind: Type) -> Tensor:
    """What ``encode`` made, in float32."""
    return torch.from_numpy(np.array(gguf.dequantize(data, kind), dtype=np.float32))


def rounding_bound(tensor: Tensor, kind: Type) -> Tensor:
    """How far a value may be off after ``encode``, float32 in the shape of the tensor.

    F32 is exact. F16 and BF16 round to 11 and 8 significant bits, F16 no finer than 2^-24. Q8_0 has, for 32 values, a
    step of amax / 127, itself rounded to F16, of which a value is off by half. Q4_0 has a step of amax / 8, and codes
    from -8 to 7 for amax of either sign: a value at the far end is off by a whole step.
    """
    values = tensor.float().abs()
    if kind == Type.F32:
        return torch.zeros_like(values)
    if kind == Type.F16:
        return values * 2.0**-11 + 2.0**-25
    if kind == Type.BF16:
        return values * 2.0**-8 + 2.0**-134
    amax = values.reshape(-1, 32).amax(1, keepdim=True).expand(-1, 32).reshape(values.shape)
    step = amax / 127 if kind == Type.Q8_0 else amax / 8
    steps, wide = (127, 0.5) if kind == Type.Q8_0 else (8, 1.0)
    half_ulp = step * 2.0**-11 + 2.0**-25  # of the step in F16
    return (step * wide + steps * half_ulp) * (1 + 2.0**-20)  # and the arithmetic in float32


def write_gguf(
    path: Path,
    *,
    family: GgufFamily,
    config: Any,
    fields: dict[str, GgufField],
    shapes: dict[str, tuple[int, ...]],
    make: Callable[[str], Tensor],
    extra: dict[str, Tensor],
    file_type: str,
) -> None:
    """Write a model.

    Args:
        fields: all metadata but architecture and file type.
        shapes: of the tensors, by the model's names, in order.
        make: called once for each.
        extra: float32 tensors under llama.cpp's own names.
        file_type: a key of ``FILE_TYPES``.
    Raises: ExportError: a tensor has no name in llama.cpp. OSError: the disk is full.
    """
    names = tensor_names(shapes, config, family)
    writer = GGUFWriter(path, family.architecture)
    for key, field in fields.items():
        writer.add_key_value(key, field.value, field.kind, field.item_kind)
    writer.add_file_type(FILE_TYPES[file_type][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = {name: stored_type(names[name], shape, file_type) for name, shape in shapes.items()}
    for name, tensor in extra.items():
        _announce(writer, name, tuple(tensor.shape), Type.F32)
    for name, shape in shapes.items():
        _announce(writer, names[name], shape, kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in extra.values():
            writer.write_tensor_data(in_full(encode(tensor, Type.F32)))
        for name in shapes:
            writer.write_tensor_data(in_full(encode(to_gguf(name, make(name), config, family), kinds[name])))
    finally:
        writer.close()


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: Type) -> None:
    """Reserve a tensor's place."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    num_bytes = math.prod(shape) // block * size
    stored = (*shape[:-1], shape[-1] // block * size) if kind not in (Type.F32, Type.F16) else shape
    dtype = {Type.F32: np.float32, Type.F16: np.float16}.get(kind, np.uint8)
    writer.add_tensor_info(name, stored, np.dtype(dtype), num_bytes, raw_dtype=kind)


def check_gguf(
    path: Path, *, family: GgufFamily, config: Any, shapes: dict[str, tuple[int, ...]], make: Callable[[str], Tensor]
) -> float:
    """Read every tensor of a file back and compare it with what it should hold.

    Returns: the largest error as a share of its bound.
    Raises: ExportError: a tensor is missing, or a value is off by more than its type rounds.
    """
    names, worst = tensor_names(shapes, config, family), 0.0
    stored = {tensor.name: tensor for tensor in GGUFReader(str(path)).tensors}
    for name in shapes:
        theirs = stored.get(names[name])
        if theirs is None:
            raise ExportError(f"{path.name}: {names[name]} is missing")
        wanted = to_gguf(name, make(name), config, family).float()
        rows = wanted.reshape(-1, wanted.shape[-1])
        data = theirs.data.reshape(len(rows), -1)
        step = max(1, SLICE_ELEMENTS // rows.shape[1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            bound = rounding_bound(part, theirs.tensor_type)
            found = decode(data[start : start + step], theirs.tensor_type).reshape(part.shape)
            error = (found - part).abs()
            if not bool((error <= bound).all()):
                raise ExportError(
                    f"{path.name}: {names[name]} is off by {float(error.max()):.3g}, {theirs.tensor_type.name} rounds "
                    f"by {float(bound.max()):.3g} at most; the file is not what was trained"
                )
            worst = max(worst, float((error / bound.clamp(min=2.0**-149)).max()))
    return worst


def carried_metadata(path: Path, family: GgufFamily) -> dict[str, GgufField]:
    """The metadata of a base's own GGUF file, as they are.

    Raises: ExportError: it is a file of another architecture, or one of several.
    """
    reader = GGUFReader(str(path))
    fields: dict[str, GgufField] = {}
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "split.")) or key in NOT_CARRIED:
            continue
        kind = field.types[0]
        if kind == GGUFValueType.ARRAY and not field.contents():  # says nothing, and cannot be written
            continue
        item = field.types[-1] if kind == GGUFValueType.ARRAY else None
        fields[key] = GgufField(field.contents(), kind, item)
    architecture = reader.get_field(Keys.General.ARCHITECTURE)
    name = architecture.contents() if architecture else None
    if name != family.architecture:
        raise ExportError(f"{path}: its architecture is {name!r}, the model's is {family.architecture!r}")
    return fields
