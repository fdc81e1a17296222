"""The private names of PEFT that longfit uses, one function each."""

from typing import Any

from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
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
