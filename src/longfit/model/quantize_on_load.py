"""How a layer's tensors become rows and constants while a model is loaded, one layer at a time.

A dense weight is quantised; the packed tensors of a bitsandbytes layer keep their bytes. transformers calls these
conversions; which layers they are called for is in ``hf_quantizer.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import get_module_from_name

from longfit.compat.transformers import do_not_initialize
from longfit.errors import ModelError
from longfit.kernels.dispatch import dequantize_4bit
from longfit.layers.experts import packed_experts
from longfit.layers.linear4bit import Linear4bit
from longfit.layers.linear8bit import Linear8bit, join_rows
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model import pack_experts
from longfit.model.accounting import is_finite
from longfit.model.adapter_start import keep_first_values
from longfit.model.mapped_files import give_back
from longfit.numerics.bitsandbytes_format import from_bitsandbytes
from longfit.numerics.row_format import RowFormat, to_rows
from longfit.numerics.vectorwise import dequantize_vectors

if TYPE_CHECKING:
    from longfit.model.own_rows import OwnRows
    from longfit.model.quantization_config import LongfitQuantizationConfig

COMPARED = 1 << 22  # weights at once, in fp32


class Quantizer(Protocol):
    """What the conversions ask of the quantiser that they belong to."""

    own_rows: OwnRows | None
    start_rank: int | None
    quantization_config: LongfitQuantizationConfig


class AddedError:
    """What quantising weights changes of them, summed while they are loaded."""

    def __init__(self) -> None:
        self._squares = self._errors = 0.0

    def add(self, stored: QuantizedLinear, weight: Tensor) -> None:
        """Compare a weight with what is stored of it."""
        dense = stored.dequantize(weight.dtype)
        for start in range(0, len(weight), step := max(1, COMPARED // max(1, weight.shape[1]))):
            rows = slice(start, start + step)
            before = weight[rows].float()
            self._squares += float(before.square().sum(dtype=torch.float64))
            self._errors += float((dense[rows].float() - before).square().sum(dtype=torch.float64))

    def relative(self) -> float | None:
        """Root mean square of the error over that of the weights; None before anything was compared."""
        return (self._errors / self._squares) ** 0.5 if self._squares else None


class QuantizeWeight(ConversionOps):
    """One dense weight in, its packed rows and constants out."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer  # by this name transformers knows not to cast what the operation reads

    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **kwargs: Any) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            weight = value[0] if isinstance(value, list) else value
            del value
            if not is_finite(weight):  # packed, a NaN would look like any other code
                raise ModelError(f"{name} holds NaN or infinity; the file is damaged or the model is broken")
            layer, _ = get_module_from_name(model, name)
            own = self.hf_quantizer.own_rows
            added = self.hf_quantizer.quantization_config.added_error
            if packed_experts(layer) is not None:
                converted |= pack_experts.store(layer, name, weight)
                if added is not None:
                    pack_experts.compare(layer, name, weight, converted, added.add)
                give_back(weight)
                continue
            if layer.stands_for_conv1d:
                read, weight = weight, weight.t().contiguous()
                give_back(read)
            rows, constants = layer.stored(weight) if own is None else own.stored(layer, weight)
            if added is not None and own is None:
                added.add(layer.sharing(rows, constants), weight)
            if (rank := self.hf_quantizer.start_rank) is not None:
                keep_first_values(layer, weight, rows, constants, rank=rank)
            give_back(weight)
            del weight
            converted |= adopted(layer, name, rows, constants)
        return converted

    @property
    def reverse_op(self) -> ConversionOps:
        return PassThrough()


class ReadBitsandbytes(ConversionOps):
    """The packed tensors of one bitsandbytes layer in, the same bytes as rows and constants out."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer  # by this name transformers knows not to cast what the operation reads

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        layer: Any
        layer, leaf = get_module_from_name(model, full_layer_name)
        if len(tensors) == 1:  # a weight that this checkpoint keeps dense; transformers has not cast it
            dtype = getattr(layer, leaf).dtype
            return {key: value.to(dtype) for key, value in tensors.items()}
        if not isinstance(layer, QuantizedLinear):  # packed by others, and yet its weight is read by other code
            return {full_layer_name: nn.Parameter(_dense(full_layer_name, tensors, layer.weight.dtype))}
        if isinstance(layer, Linear8bit):
            rows = join_rows(*from_bitsandbytes_int8(full_layer_name, tensors))
            return adopted(layer, full_layer_name, rows, rows.new_empty(0, dtype=torch.uint8))
        assert isinstance(layer, Linear4bit), "the only other kind"
        packed, state = from_bitsandbytes(_without_prefix(tensors))
        layer.row_format = RowFormat.of(state)
        return adopted(layer, full_layer_name, *to_rows(packed, state))

    @property
    def reverse_op(self) -> ConversionOps:
        return PassThrough()


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("weight").lstrip(".") or "weight": value for key, value in tensors.items()}


def _dense(name: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight of a bitsandbytes layer, de-quantised."""
    if "SCB" in tensors:
        return dequantize_vectors(*from_bitsandbytes_int8(name, tensors), dtype=dtype)
    return dequantize_4bit(*from_bitsandbytes(_without_prefix(tensors)), dtype)


class PassThrough(ConversionOps):
    """Saving needs no conversion: ``LongfitQuantizer.get_state_dict_and_metadata`` has already written bitsandbytes'
    keys."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def from_bitsandbytes_int8(name: str, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The codes int8 ``[O, I]`` and absmax fp32 ``[O]`` of an 8-bit layer.

    Raises: ModelError: the codes are in an order that only old CUDA kernels know.
    """
    layout = int(tensors["weight_format"]) if "weight_format" in tensors else 0
    if layout != 0:
        raise ModelError(
            f"{name}: codes in bitsandbytes' layout {layout}, made for the tensor cores of one card; save the "
            "checkpoint again with bitsandbytes 0.45 or later, or give the original model"
        )
    return tensors["weight"], tensors["SCB"].float().reshape(-1)


def adopted(layer: QuantizedLinear, weight_name: str, rows: Tensor, constants: Tensor) -> dict[str, Tensor]:
    """A layer's stored tensors under their full names; transformers puts them into the layer."""
    do_not_initialize(layer.weight)
    return {
        weight_name: nn.Parameter(rows, requires_grad=False),
        weight_name.removesuffix("weight") + "constants": constants,
    }
