"""How transformers is told to build a model of quantised layers: a registered quantiser, nothing patched.

transformers builds the model without memory, asks the quantiser which modules to replace, then hands over one dense
tensor after the other (or, for a bitsandbytes checkpoint, the packed tensors of one layer). Each is turned into rows
at once, so the dense model never exists. Saving goes the other way: files carry bitsandbytes' keys and configuration,
so that anyone can load them.
"""

from __future__ import annotations

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
    register_quantizer,
)

from longfit.compat.transformers import (
    do_not_initialize,
    set_weight_conversions,
    tied_weights,
    weight_conversions,
)
from longfit.errors import ModelError
from longfit.layers.experts import packed_experts
from longfit.layers.linear4bit import Linear4bit
from longfit.layers.linear8bit import Linear8bit
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model import pack_experts
from longfit.model.quantization_config import BITSANDBYTES_KEYS, QUANT_METHOD, LongfitQuantizationConfig
from longfit.model.quantize_on_load import (
    QuantizeWeight,
    ReadBitsandbytes,
)
from longfit.model.weight_conversions import by_size, without_quantized
from longfit.model.weight_reads import PLAIN, READ, weight_reads
from longfit.numerics.bitsandbytes_format import to_bitsandbytes
from longfit.numerics.row_format import RowFormat

if TYPE_CHECKING:
    from longfit.model.own_rows import OwnRows


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
