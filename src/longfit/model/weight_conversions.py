"""How fused tensors of a checkpoint reach layers in few bits: cut by the layers' own sizes, never fused again in files.

Some families store q, k and v as one tensor, which transformers cuts on loading and joins on saving. It cuts by the
shapes of the model's parameters, which here are shapes of bytes; and bytes of several weights joined are bytes of none.
So it is told the dense shapes, and what is quantised is saved under the model's own names, which it reads as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Split, WeightConverter

from longfit.layers.quantized_linear import QuantizedLinear


class SplitBySize(Split):
    """transformers' cut of a fused tensor, by the sizes of dense weights."""

    def convert(self, input_dict: dict[str, Any], *, model: Any, **more: Any) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = super().convert(input_dict, model=_DenseShapes(model), **more)
        return parts


class _DenseShapes:
    """A model of which only the shapes of parameters are asked."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def get_parameter(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        layer = self._model.get_submodule(path)
        if isinstance(layer, QuantizedLinear) and leaf == "weight":
            return torch.empty(layer.out_features, layer.in_features, device="meta")
        return self._model.get_parameter(name)


def by_size(conversions: Iterable[Any]) -> list[Any]:
    """The same conversions, cutting by the sizes of dense weights."""
    return [_by_size(each) if isinstance(each, WeightConverter) else each for each in conversions]


def _by_size(conversion: WeightConverter) -> WeightConverter:
    if any(type(operation) is Split for operation in conversion.operations):
        conversion = copy.deepcopy(conversion)
        conversion.operations = [SplitBySize(o.dim) if type(o) is Split else o for o in conversion.operations]
    return conversion


def without_quantized(conversions: Iterable[Any], quantized: Iterable[str]) -> list[Any]:
    """Those conversions that saving may turn around: none that joins or changes quantised weights.

    Args:
        quantized: full names of weights in few bits.
    """
    names = list(quantized)

    def touches(each: Any) -> bool:
        back = each.reverse_transform()
        return any(back.rename_source_key(name)[1] is not None for name in names)

    return [each for each in conversions if not (isinstance(each, WeightConverter) and touches(each))]
