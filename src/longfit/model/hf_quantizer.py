"""How transformers is told to build a model of quantised layers: a registered quantiser, nothing patched.

transformers builds the model without memory, asks the quantiser which modules to replace, then hands over one dense
tensor after the other (or, for a bitsandbytes checkpoint, the packed tensors of one layer). Each is turned into rows
at once, so the dense model never exists. Saving goes the other way: files carry bitsandbytes' keys and configuration,
so that anyone can load them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import (
    HfQuantizer,
    get_module_from_name,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from longfit.compat.transformers import (
    do_not_initialize,
    set_weight_conversions,
    tied_weights,
    weight_conversions,
)
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
from longfit.model.weight_conversions import by_size, without_quantized
from longfit.model.weight_reads import PLAIN, READ, weight_reads
from longfit.numerics.bitsandbytes_format import from_bitsandbytes, to_bitsandbytes
from longfit.numerics.row_format import RowFormat, to_rows
from longfit.numerics.vectorwise import dequantize_vectors

if TYPE_CHECKING:
    from longfit.model.own_rows import OwnRows

QUANT_METHOD = "longfit"
NOT_SETTINGS = ("own_rows", "added_error", "start_rank")
"""What a configuration carries for one loading only."""
BITSANDBYTES_KEYS = {
    quant_type: [
        "weight",
        "weight.absmax",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_map",
        f"weight.quant_state.bitsandbytes__{quant_type}",
    ]
    for quant_type in ("nf4", "fp4")
} | {"int8": ["weight", "SCB", "weight_format"]}
COMPARED = 1 << 22  # weights at once, in fp32


@register_quantization_config(QUANT_METHOD)
class LongfitQuantizationConfig(QuantizationConfigMixin):
    """What to store linear layers in.

    Args:
        quant_type: ``"nf4"``, ``"fp4"``, ``"int4"``, or ``"int8"`` with one constant a row, where the sizes below do
            not act.
        block_size: weights per absmax.
        double_quant: store the absmax values as 8-bit codes (QLoRA, section 3).
        absmax_block_size: absmax values per constant of the double quantisation.
        skip_modules: names of linear layers to leave dense, beside the output head and tied weights.
        int8_modules: full names of linear layers to store in 8 bits, whatever ``quant_type`` is.
        threshold: int8 only: quantise activations too, up to this magnitude (LLM.int8()); None multiplies by the
            de-quantised weights.
        experts: quantise stacked experts as well.
        dtype: of the dense weights, as transformers resolves it; recorded in files.
    """

    def __init__(
        self,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        absmax_block_size: int = 256,
        skip_modules: list[str] | None = None,
        int8_modules: list[str] | None = None,
        threshold: float | None = None,
        experts: bool = True,
        dtype: str = "bfloat16",
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.quant_type, self.block_size, self.double_quant = quant_type, block_size, double_quant
        self.absmax_block_size, self.skip_modules, self.dtype = absmax_block_size, skip_modules, dtype
        self.int8_modules, self.threshold = int8_modules, threshold
        self.experts = experts
        self.own_rows: OwnRows | None = None
        self.added_error: AddedError | None = None
        self.start_rank: int | None = None  # of adapters that begin with what rounding loses

    def __deepcopy__(self, memo: dict[int, Any]) -> LongfitQuantizationConfig:
        """All settings again, and the same devices: process groups cannot be copied."""
        other = copy.copy(self)
        memo[id(self)] = other
        return other

    @classmethod
    def from_bitsandbytes(cls, block: dict[str, Any]) -> LongfitQuantizationConfig:
        """Read the ``quantization_config`` block of a bitsandbytes checkpoint, in 4 or 8 bits; experts are dense."""
        if block.get("load_in_8bit") or block.get("_load_in_8bit"):
            return cls(
                quant_type="int8",
                skip_modules=block.get("llm_int8_skip_modules"),
                experts=False,
                dtype=block.get("dtype", "float16"),
            )
        return cls(
            quant_type=block.get("bnb_4bit_quant_type", "fp4"),
            double_quant=block.get("bnb_4bit_use_double_quant", False),
            skip_modules=block.get("llm_int8_skip_modules"),
            experts=False,
            dtype=block.get("bnb_4bit_compute_dtype", "float32"),
        )

    def settings(self) -> dict[str, Any]:
        """The arguments that make the same configuration."""
        return {key: value for key, value in self.__dict__.items() if key not in NOT_SETTINGS}

    def to_dict(self) -> dict[str, Any]:
        """The block written into ``config.json``: bitsandbytes' own where its files can hold the data type."""
        eight = self.quant_type == "int8"
        other_blocks = not eight and (self.block_size != 64 or self.absmax_block_size != 256)
        if self.quant_type not in BITSANDBYTES_KEYS or other_blocks or self.int8_modules or self.experts:
            return self.settings()
        return {
            "_load_in_4bit": not eight,
            "_load_in_8bit": eight,
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4" if eight else self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": self.skip_modules,
            "llm_int8_threshold": 6.0 if self.threshold is None else self.threshold,
            "load_in_4bit": not eight,
            "load_in_8bit": eight,
            "quant_method": "bitsandbytes",
        }


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

    def __init__(self, hf_quantizer: LongfitQuantizer) -> None:
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

    def __init__(self, hf_quantizer: LongfitQuantizer) -> None:
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


@register_quantizer(QUANT_METHOD)
class LongfitQuantizer(HfQuantizer):
    """Builds, fills and saves quantised layers; ``skipped`` tells which linear layers stayed dense and why."""

    requires_calibration = False
    quantization_config: LongfitQuantizationConfig

    def __init__(self, quantization_config: LongfitQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.skipped: dict[str, str] = {}
        self.own_rows: OwnRows | None = quantization_config.own_rows
        self.start_rank = quantization_config.start_rank
        self._renamings: list[Any] = []

    @property
    def quantized_element_size(self) -> float:
        return 1.0 if self.quantization_config.quant_type == "int8" else 0.5

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        self.dtype = dtype or torch.bfloat16
        self.quantization_config.dtype = str(self.dtype).removeprefix("torch.")
        return self.dtype

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if (packed := packed_experts(module)) is not None:
            return name in packed.formats
        return isinstance(module, QuantizedLinear) and name == "weight"

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        self.skipped = skipped_linears(model, config.skip_modules or [])
        linears = {name: module for name, module in all_linears(model) if name not in self.skipped}
        unknown = sorted(set(config.int8_modules or []) - linears.keys())
        if unknown:
            raise ModelError(f"int8_modules: {', '.join(unknown)}: no linear layers that are quantised; see eval quant")
        for name, module in list(linears.items()):
            eight = config.quant_type == "int8" or name in (config.int8_modules or [])
            replacement = self._placeholder(module, eight=eight)
            # Bytes are read, never drawn at random; what lacks them is refused.
            do_not_initialize(replacement)
            if self.own_rows is not None and not self.pre_quantized and not replacement.stands_for_conv1d:
                self.own_rows.make_place(replacement)
            model.set_submodule(name, replacement)
        self._pack_experts(model)

    def _pack_experts(self, model: Any) -> None:
        """Make room for bytes in place of stacked experts; a model without any is written as bitsandbytes does."""
        config = self.quantization_config
        skipped = pack_experts.skipped_experts(model, config.skip_modules or [], packed_here=config.experts)
        self.skipped |= skipped
        found = list(pack_experts.packable_experts(model, skipped))
        for _path, module, names in found:
            pack_experts.pack(module, names, partial(self._placeholder, eight=config.quant_type == "int8"))
        config.experts = bool(found)
        self._renamings = pack_experts.renamings(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        pack_experts.compute_packed(model)
        layers = (name for name, module in model.named_modules() if isinstance(module, QuantizedLinear))
        kept = without_quantized(weight_conversions(model), [f"{name}.weight" for name in layers])
        set_weight_conversions(model, kept)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """What transformers does to a checkpoint's tensors on their way in, made for layers in few bits."""
        return by_size(super().update_weight_conversions(weight_conversions, model))

    def get_weight_conversions(self) -> list[Any]:
        renamings = self._renamings if self.pre_quantized else []
        return [*super().get_weight_conversions(), *renamings]

    def _placeholder(self, dense: nn.Module, *, eight: bool) -> QuantizedLinear:
        layer = self._empty(*in_out(dense), bias=dense.bias is not None, eight=eight)
        layer.stands_for_conv1d = isinstance(dense, Conv1D)
        return layer

    def _empty(self, in_features: int, out_features: int, *, bias: bool, eight: bool) -> QuantizedLinear:
        config = self.quantization_config
        if eight:
            return Linear8bit.placeholder(
                out_features,
                in_features,
                dtype=self.dtype,
                bias=bias,
                device="meta",
                threshold=config.threshold,
            )
        row_format = RowFormat(
            out_features=out_features,
            in_features=in_features,
            quant_type=config.quant_type,
            block_size=config.block_size,
            double_quant=config.double_quant,
            absmax_block_size=config.absmax_block_size,
            dtype=self.dtype,
        )
        return Linear4bit.placeholder(row_format, bias=bias, bias_dtype=self.dtype, device="meta")

    def get_quantize_ops(self) -> QuantizeWeight:
        return QuantizeWeight(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": ReadBitsandbytes}

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        return {"weight": BITSANDBYTES_KEYS.get(self.quantization_config.quant_type, ["weight"])}

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict with every quantised layer written under bitsandbytes' keys.

        What ``merge_and_unload`` has made dense is described as dense: in the configuration that is written next.
        """
        self._describe(model)
        state_dict = model.state_dict()
        for name, written in pack_experts.file_names(model).items():
            state_dict[written] = state_dict.pop(name)
        for name, module in model.named_modules():
            if isinstance(module, Linear8bit):
                del state_dict[f"{name}.constants"]
                codes, absmax = module.codes_and_absmax()
                state_dict[f"{name}.weight"] = codes.contiguous()
                state_dict[f"{name}.SCB"] = absmax
                state_dict[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)  # row by row
            elif isinstance(module, Linear4bit):
                del state_dict[f"{name}.constants"]
                for key, tensor in to_bitsandbytes(*module.packed()).items():
                    state_dict[f"{name}.weight" if key == "weight" else f"{name}.weight.{key}"] = tensor
        return state_dict, {}

    def _describe(self, model: Any) -> None:
        """Let the model's configuration say which layers are quantised now; nothing if none is."""
        quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
        experts = any(True for _ in pack_experts.packed_parameters(model))
        if not quantized and not experts:
            if getattr(model.config, "quantization_config", None) is not None:
                del model.config.quantization_config
            return
        config = self.quantization_config
        known = config.skip_modules or []
        dense = skipped_linears(model, known)
        merged = [name for name, _ in all_linears(model) if name not in dense]
        if experts:
            merged += pack_experts.unpacked(model, known)
        config.experts = experts
        if merged:
            config.skip_modules = [*known, *merged]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        config = self.quantization_config
        return config.quant_type in BITSANDBYTES_KEYS and not config.int8_modules  # a file holds one type

    @property
    def is_trainable(self) -> bool:
        return True


def all_linears(model: Any) -> Iterator[tuple[str, Any]]:
    """Linear layers of every kind, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PLAIN))


def in_out(dense: Any) -> tuple[int, int]:
    """Widths of a dense linear layer."""
    return dense.weight.shape if isinstance(dense, Conv1D) else dense.weight.shape[::-1]


def skipped_linears(model: Any, skip_modules: list[str]) -> dict[str, str]:
    """Which linear layers stay dense, and why: name to reason."""
    head = model.get_output_embeddings()
    tied = {name.removesuffix(".weight") for pair in tied_weights(model).items() for name in pair}
    reads = weight_reads(model)
    reasons = {}
    for name, module in all_linears(model):
        if pack_experts.is_skipped(name, skip_modules):
            reasons[name] = "named in skip_modules"
        elif name in tied:
            reasons[name] = "shares its weight with the embeddings"
        elif module is head:
            reasons[name] = "output head: its error goes into every logit"
        elif name in reads.read:
            reasons[name] = READ
        elif type(module) not in PLAIN and name not in reads.plain:
            reasons[name] = f"a {type(module).__name__}, not a plain nn.Linear"
        elif in_out(module)[0] % 2:  # in 8 bits, too, so that one list holds for both
            reasons[name] = f"odd number of input features ({in_out(module)[0]})"
    return reasons
