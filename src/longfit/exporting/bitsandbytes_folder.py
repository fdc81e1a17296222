"""The merged model quantised again, in bitsandbytes' own format: opens in transformers with bitsandbytes installed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from longfit.exporting.merge_plan import MergePlan
from longfit.exporting.model_folder import write_model_files
from longfit.exporting.shards import Planned, write_shards
from longfit.kernels.dispatch import dequantize_4bit, quantize_4bit
from longfit.model.quantization_config import LongfitQuantizationConfig
from longfit.numerics.bitsandbytes_format import to_bitsandbytes

SETTINGS_BYTES = 256  # of a weight's JSON settings, which have 130 to 200


def write_bitsandbytes(folder: Path, plan: MergePlan, kind: str, *, dtype: torch.dtype) -> list[str]:
    """Write NF4 with double quantisation, what is not a linear layer in ``dtype``.

    Returns: names of the files with weights.
    """
    packed, weights = set(plan.quantizable), plan.weights(kind)
    pending: dict[str, Tensor] = {}

    def make(planned: Planned) -> Tensor:
        if planned.name not in pending:
            pending.clear()
            pending.update(_tensors(planned.name, plan.make(_owner(planned.name, packed), weights), packed, dtype))
        return pending.pop(planned.name)

    planned = [item for tensor in plan.tensors for item in _planned(tensor, packed, dtype)]
    paths = write_shards(folder, planned, make)
    write_model_files(folder, plan.trained, plan.config, dtype=dtype)
    block = LongfitQuantizationConfig(dtype=str(dtype).removeprefix("torch."), experts=False).to_dict()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"quantization_config": block}, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    return [path.name for path in paths]


def _tensors(name: str, weight: Tensor, packed: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
    owner = _owner(name, packed)
    if owner not in packed:
        return {name: weight.to(dtype)}
    parts = to_bitsandbytes(*quantize_4bit(weight.to(dtype), quant_type="nf4", block_size=64, double_quant=True))
    return {owner if key == "weight" else f"{owner}.{key}": _padded(key, tensor) for key, tensor in parts.items()}


def rounded(name: str, weight: Tensor, plan: MergePlan, *, dtype: torch.dtype) -> Tensor:
    """A merged weight as the folder holds it."""
    weight = weight.cpu().to(dtype)
    if name not in plan.quantizable:
        return weight
    return dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", block_size=64, double_quant=True), torch.float32)


def _padded(key: str, tensor: Tensor) -> Tensor:
    """The JSON text of a weight's settings in a length that does not depend on how many digits its numbers have.

    The header of the file, which names all lengths, is written before the weights are read. JSON ignores spaces.
    """
    if not key.startswith("quant_state."):
        return tensor
    spaces = torch.full((SETTINGS_BYTES - len(tensor),), ord(" "), dtype=torch.uint8)
    return torch.cat([tensor, spaces])


def _planned(tensor: Planned, packed: set[str], dtype: torch.dtype) -> list[Planned]:
    """What a weight becomes in the file; found by quantising zeros of its shape, as only the values differ."""
    if tensor.name not in packed:
        return [Planned(tensor.name, tensor.shape, dtype)]
    made = _tensors(tensor.name, torch.zeros(tensor.shape), packed, dtype)
    return [Planned(name, tuple(part.shape), part.dtype) for name, part in made.items()]


def _owner(name: str, packed: set[str]) -> str:
    """The weight that a tensor of the file is, or is a part of."""
    return next((owner for owner in (name, name.split(".weight.")[0] + ".weight") if owner in packed), name)
