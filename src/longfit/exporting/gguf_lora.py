"""An adapter as GGUF, for llama.cpp's ``--lora``: the same low-rank matrices under llama.cpp's names.

llama.cpp multiplies by ``alpha / rank`` of each tensor. Where the adapter's scalings differ from tensor to tensor, or
are not of that form, they are multiplied into B and alpha is left out. It can hold neither norms nor embeddings that
were trained whole, nor DoRA's magnitudes: such an adapter has to be merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, Keys
from gguf.constants import GGUFType

from longfit.errors import ExportError
from longfit.exporting.gguf_families import Family, to_gguf
from longfit.exporting.gguf_file import tensor_names
from longfit.model.adapter_weights import AdapterWeights


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


def write_lora(path: Path, adapter: AdapterWeights, *, family: Family, config: Any, name: str) -> int:
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
        writer.add_tensor(f"{names[key]}.lora_a", np.ascontiguousarray(update.A.float().numpy()))
        writer.add_tensor(f"{names[key]}.lora_b", np.ascontiguousarray(B.numpy()))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return 2 * len(updates)
