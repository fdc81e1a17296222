"""An adapter as GGUF, for llama.cpp's ``--lora``: the same low-rank matrices under llama.cpp's names.

llama.cpp multiplies by ``alpha / rank`` of each tensor. Where the adapter's scalings differ from tensor to tensor, or
are not of that form, they are multiplied into B and alpha is left out. It can hold neither norms nor embeddings that
were trained whole, nor DoRA's magnitudes: such an adapter has to be merged.

What was written is read back the way a GGUF model is read, and compared with the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, GGUFWriter, Keys
from gguf.constants import GGUFType

from longfit.errors import ExportError
from longfit.exporting.gguf_families import GgufFamily, to_gguf
from longfit.exporting.gguf_file import in_full, tensor_names
from longfit.model import gguf
from longfit.model.adapter_weights import AdapterWeights, LowRank


def require_plain(adapter: AdapterWeights, source: str) -> None:
    """Raise ExportError if the adapter is more than low-rank matrices."""
    lost = sorted(adapter.whole) + sorted(adapter.rows)
    if lost:
        raise ExportError(
            f"{source}: trained {len(lost)} tensors whole (norms, embeddings), first {lost[0]}; a GGUF adapter has no "
            f"place for them. Merge it: longfit export {source} --format gguf"
        )
    dora = [name for name in adapter.low_rank if "lora_magnitude_vector" in adapter.low_rank[name]]
    if dora:
        raise ExportError(
            f"{source}: uses DoRA, which llama.cpp does not have. Merge it: longfit export {source} --format gguf"
        )


def write_lora(path: Path, adapter: AdapterWeights, *, family: GgufFamily, config: Any, name: str) -> int:
    """Write the adapter.

    Returns: the number of tensors.
    Raises: ExportError: a layer has no name in llama.cpp. OSError: the disk is full.
    """
    names = tensor_names(adapter.low_rank, config, family)
    updates = {key: adapter.update_of(key) for key in adapter.low_rank}
    alphas = {update.scaling * update.rank for update in updates.values() if update is not None}
    alpha = alphas.pop() if len(alphas) == 1 else 0.0
    writer = GGUFWriter(path, family.architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    for key, update in updates.items():
        assert update is not None, key
        B = update.B.float() if alpha else update.B.float() * update.scaling
        B = to_gguf(key, B, config, family)  # its rows are those of the weight
        writer.add_tensor(f"{names[key]}.lora_a", in_full(update.A.float().numpy()))
        writer.add_tensor(f"{names[key]}.lora_b", in_full(B.numpy()))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return 2 * len(updates)


def read_lora(path: Path, config: Any) -> dict[str, LowRank]:
    """The updates of an adapter's file, by the model's names, scaled as llama.cpp scales them."""
    alpha = GGUFReader(str(path)).fields[Keys.Adapter.LORA_ALPHA].contents()
    tensors = gguf.lora_state_dict(path, config)
    return {name: LowRank(A[...], B[...], alpha / A.shape[0] if alpha else 1.0) for name, (A, B) in tensors.items()}


def check_lora(path: Path, adapter: AdapterWeights, config: Any) -> dict[str, LowRank]:
    """Compare an adapter's file with the adapter.

    A is stored in float32, as it is. B, or alpha, is rounded once to float32, and so is what is read for the product of
    the two: they differ by 2 u of it, u = 2^-24.

    Returns: the updates that it holds.
    Raises: ExportError: one is missing, or off by more.
    """
    found = read_lora(path, config)
    if found.keys() != adapter.low_rank.keys():
        other = sorted(found.keys() ^ adapter.low_rank.keys())
        raise ExportError(f"{path.name}: {other[0]} is in only one of the file and the adapter; nothing was left there")
    for name, ours in found.items():
        theirs = adapter.update_of(name)
        assert theirs is not None, name
        A, B = (part.double() for part in (theirs.A, theirs.B))
        for part, read, wanted, bound in (
            ("A", ours.A.double(), A, 0.0),
            ("B", ours.B.double() * ours.scaling, B * theirs.scaling, 2 * 2.0**-24),
        ):
            error = (read - wanted).abs() if read.shape == wanted.shape else torch.tensor(torch.inf)
            allowed = bound * wanted.abs() + 2.0**-149
            if not bool((error <= allowed).all()):
                raise ExportError(
                    f"{path.name}: {part} of {name} is off by {float(error.max()):.3g}, rounding explains"
                    f" {float(allowed.max()):.3g} at most; the file is not what was trained, nothing was left there"
                )
    return found


def take_over(model: Any, updates: Mapping[str, LowRank]) -> None:
    """Set the adapter of a PeftModel to these updates, in place."""
    with torch.no_grad():
        for name, update in updates.items():
            layer = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
            layer.lora_A["default"].weight.copy_(update.A)
            layer.lora_B["default"].weight.copy_(update.B * (update.scaling / layer.scaling["default"]))
