"""What a model folder says about itself is checked before anything is built or allocated from it.

The headers of safetensors files name every tensor with its type and shape: a few kilobytes that tell whether the
weights are those that ``config.json`` describes. So a truncated download, a configuration of another model, integers
where numbers with a fraction belong and a layer count of a thousand million all end here, at no cost.

What this is not: it reads no weights (``accounting.py`` looks at those that were loaded).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any

from longfit.errors import LongfitError, ModelError
from longfit.files.reading import read_object, require_regular

ADAPTER = "adapter_model.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER_BYTES = 100_000_000  # of safetensors' own reader
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4},
    **{"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64},
}
BUFFERS = re.compile(r"(position_ids|attn\.bias|attention\.bias|masked_bias|inv_freq|num_batches_tracked)$")
"""Tensors of older checkpoints that a model makes itself; they may be of any type and are not read."""

LARGEST_COUNTS = {
    **{"num_hidden_layers": 10_000, "n_layer": 10_000, "n_layers": 10_000, "num_layers": 10_000},
    **{"num_experts": 100_000, "num_local_experts": 100_000, "n_routed_experts": 100_000},
    **{"num_attention_heads": 100_000, "num_key_value_heads": 100_000, "head_dim": 100_000, "n_head": 100_000},
}
"""Ten times and more what any published model has; what is made once for each of them must not be made for ever."""
LARGEST_SIZE = 2**31 - 1
MOST_MISSING = 2
"""What a configuration may describe beyond its weights: transformers makes what is missing before it can be named."""


@dataclass(frozen=True)
class TensorHeader:
    """A tensor in a safetensors file: its type as the format spells it, its shape, and its file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


def require_sane_counts(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError for a count or size that no model has; transformers would begin to build it.

    Args:
        name: of the model, for the message.
        config: as ``config.json`` holds it; the configurations in it are looked at too.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            require_sane_counts(f"{name}: {key}", value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        is_size = key in LARGEST_COUNTS or key.endswith(("_size", "_dim", "_layers", "_heads"))
        largest = LARGEST_COUNTS.get(key, LARGEST_SIZE)
        if is_size and value > largest:
            raise ModelError(
                f"{name}: {key} = {value:,} in config.json: at most {largest:,} are allowed; fetch config.json again"
            )


def model_folder(name: str, *, error: type[LongfitError] = ModelError, do: str = "give a folder that has them") -> Path:
    """The folder of a model: itself, or the snapshot of a hub id.

    Args:
        error: to raise.
        do: what to advise.
    Raises: ``error``: it is not there and cannot be fetched.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as cause:
        raise error(f"{name}: its weights are neither here nor reachable; {do}") from cause


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Read the headers of a model folder's safetensors files.

    Returns: every tensor by name; empty where the folder has no safetensors files.
    Raises: ModelError: a file is missing, no regular file, cut short, or its header is damaged.
    """
    if (folder / SINGLE).exists():
        return _read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        return {}
    index = read_object(folder / INDEX, ModelError, what="the index of the weights")
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ModelError(f"{folder / INDEX}: has no 'weight_map' of tensors to files; fetch it again")
    found: dict[str, TensorHeader] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise ModelError(f"{folder / INDEX}: {file!r} is not a file name; all weights must be in this folder")
        if not (folder / file).exists():
            raise ModelError(f"{folder / file}: is named by {INDEX} and is not there; fetch the missing file")
        found |= _read_header(folder / file)
    misplaced = [tensor for tensor, file in files.items() if tensor not in found or found[tensor].file.name != file]
    if misplaced:
        raise ModelError(
            f"{folder / INDEX}: {len(misplaced)} tensors are not in the file it names, first {misplaced[0]!r} in "
            f"{files[misplaced[0]]}; fetch the folder again"
        )
    return found


def read_adapter_header(folder: Path) -> dict[str, TensorHeader]:
    """Read the header of an adapter's weights.

    Raises: ModelError: they are not there, damaged, or no numbers with a fraction.
    """
    path = folder / ADAPTER
    if not path.exists():
        raise ModelError(f"{folder}: no {ADAPTER}; longfit reads no pickled adapters: give the adapter folder of a run")
    header = _read_header(path)
    _require_floats(header, do="give the adapter as it was saved")
    return header


def fingerprints(name: str) -> dict[str, str]:
    """Return what tells a base model from another: sizes and samples of its files, by name.

    A hundredth of a second even for large weights; it finds another model and most damage, not every flipped bit.

    Args:
        name: a folder or a file; a hub id, whose files are elsewhere, has none.
    """
    path = Path(name)
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("config.json")])
    return {file.name: _sample(file) for file in files if file.is_file()}


SAMPLES, SAMPLE_BYTES, ENDS_BYTES = 64, 4096, 1 << 16


def _sample(path: Path) -> str:
    size = path.stat().st_size
    state = blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        state.update(file.read(ENDS_BYTES))
        for number in range(SAMPLES):
            file.seek(number * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
            state.update(file.read(SAMPLE_BYTES))
    return state.hexdigest()


def _read_header(path: Path) -> dict[str, TensorHeader]:
    require_regular(path, ModelError)
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(size - 8, LARGEST_HEADER_BYTES):
            raise ModelError(f"{path}: not a safetensors file, or cut short ({size:,} bytes); fetch it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        found = {name: _tensor(entry, path) for name, entry in header.items()}
        spans = sorted((*_span(entry), name) for name, entry in header.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: the header of this safetensors file is damaged ({error}); fetch it again") from error
    end = 0
    for begin, stop, name in spans:
        needed = -(-found[name].numel * BITS[found[name].dtype] // 8)
        if begin != end or stop - begin != needed:
            raise ModelError(
                f"{path}: tensor {name!r} lies at bytes {begin:,} to {stop:,}, expected {end:,} to {end + needed:,}; "
                "the file is damaged: fetch it again"
            )
        end = stop
    if 8 + length + end != size:
        raise ModelError(
            f"{path}: has {size:,} bytes, its header describes {8 + length + end:,}; the download is not complete: "
            "fetch it again"
        )
    return found


def _span(entry: Mapping[str, Any]) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    return int(begin), int(end)


def _tensor(entry: Mapping[str, Any], path: Path) -> TensorHeader:
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype not in BITS:
        raise ValueError(f"unknown type {dtype!r}")
    if not all(isinstance(size, int) and 0 <= size <= 2**48 for size in shape):
        raise ValueError(f"shape {shape}")
    return TensorHeader(dtype, tuple(shape), path)


def require_fitting(headers: Mapping[str, TensorHeader], config: Any, *, prequantized: bool) -> None:
    """Raise ModelError unless the tensors have types to train on, and their number and shapes are the configuration's.

    Args:
        headers: from `read_headers`.
        config: transformers' configuration of the model.
        prequantized: whether the checkpoint holds packed weights, whose types and shapes are their own.
    """
    if not prequantized:
        _require_floats(headers, do="give the original model, or a bitsandbytes 4-bit checkpoint")
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    numbers = {int(match[1]) for name in headers if (match := re.search(r"\.(\d+)\.", name))}
    some = next(iter(headers.values())).file.parent
    if isinstance(layers, int) and numbers and layers > max(numbers) + 1:
        raise ModelError(
            f"{some}: config.json says {layers:,} layers, the weights have {max(numbers) + 1:,}; one of the two is of "
            "another model, or a file of the weights is missing: fetch the folder again"
        )
    skeleton = _skeleton(config)
    for name, parameter in skeleton.items():
        found = headers.get(name)
        if found is not None and not prequantized and found.shape != tuple(parameter.shape):
            raise ModelError(
                f"{found.file}: {name} has shape {list(found.shape)}, config.json describes "
                f"{list(parameter.shape)}; the two are of different models: fetch the folder again"
            )
    held, needed = sum(header.numel for header in headers.values()), sum(p.numel() for p in skeleton.values())
    if needed > MOST_MISSING * (8 if prequantized else 1) * held:
        raise ModelError(
            f"{some}: config.json describes {needed:,} parameters, the weights have {held:,}; fetch the folder again"
        )


def _require_floats(headers: Mapping[str, TensorHeader], *, do: str) -> None:
    for name, header in headers.items():
        if header.dtype not in FLOATS and not BUFFERS.search(name):
            allowed = ", ".join(sorted(FLOATS))
            raise ModelError(f"{header.file}: {name} holds {header.dtype}; weights to train from are {allowed}; {do}")


def _skeleton(config: Any) -> dict[str, Any]:
    """The parameters of a model of this configuration, by name, without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return dict(AutoModelForCausalLM.from_config(config).named_parameters())
