"""What linear layers are stored in: the configuration that transformers gives to the quantiser and writes to files."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from longfit.model.own_rows import OwnRows
    from longfit.model.quantize_on_load import AddedError

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
