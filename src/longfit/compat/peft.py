"""The private names of PEFT that longfit uses, one function each."""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import (
    _MODEL_TO_CONVERSION_PATTERN,
    _MOE_TARGET_MODULE_MAPPING,
    convert_peft_adapter_state_dict_for_transformers,
)
from torch import nn


def register_adapter_layer(config: Any, layer: type[nn.Module], adapter_layer: type[nn.Module]) -> None:
    """Tell PEFT which adapter layer to put on a kind of layer, for one ``LoraConfig``; its files do not carry it.

    PEFT calls it experimental; there is no public way to bring a quantised layer of one's own.
    """
    config._register_custom_module({layer: adapter_layer})


def names_of_experts(model_type: str) -> frozenset[str]:
    """Return the layers' names that PEFT takes, in a family, for the experts and routers of transformers 4."""
    family = _MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return frozenset(_MOE_TARGET_MODULE_MAPPING.get(family, ()))


def takes_adapter(model: Any, name: str) -> bool:
    """Whether PEFT puts LoRA on a layer of that last name in this family; it refuses some that Mamba's kernels read."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name)
    except ValueError:
        return False
    return True


def lost_on_loading(model: Any, names: list[str]) -> set[str]:
    """Return the layers whose adapters PEFT loads under another name, which no layer has, and so drops.

    It renames an adapter's keys as transformers renames those of a checkpoint, which hits names that are right already.
    """
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    kept = convert_peft_adapter_state_dict_for_transformers(
        model, LoraConfig(), {key: torch.empty(1, 1) for key in keys}
    )
    return {name for key, name in keys.items() if key not in kept}
