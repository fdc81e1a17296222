"""Load a pretrained causal language model, quantised tensor by tensor on the way in (QLoRA, section 3).

A model is a hub id, a folder with safetensors, or one ``.gguf`` file. Remote code is never run, pickle files are
never read. What was quantised, what was not and why comes back with the model as a ``LoadReport``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from longfit.compat.torch_distributed import local_part
from longfit.errors import ModelError
from longfit.files.reading import reading
from longfit.kernels.cpu import processor
from longfit.layers.experts import constants_of
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model import (
    gguf,
    hf_quantizer,  # noqa: F401  (registers itself with transformers)
)
from longfit.model.accounting import accounted
from longfit.model.adapter_start import require_start
from longfit.model.description import read_config, read_tokenizer
from longfit.model.mapped_files import copy_out
from longfit.model.pack_experts import packed_parameters
from longfit.model.quantization_config import LongfitQuantizationConfig
from longfit.model.quantize_on_load import AddedError
from longfit.model.stored_formats import StoredFormat, stored_format
from longfit.model.stored_weights import StoredWeights
from longfit.model.vocabulary import add_rows, require_rows
from longfit.model.weight_files import model_folder, read_headers, require_fitting

if TYPE_CHECKING:
    from longfit.model.own_rows import OwnRows

QUANT_TYPES = ("nf4", "fp4", "int4", "int8")
_STORED = "_longfit_stored"


@dataclass(frozen=True)
class LoadReport:
    """What loading did to a model.

    Attributes:
        source: where the weights came from.
        quantized: names of the layers now stored in few bits.
        dense: names of linear layers and other large parameters left as they were, with the reason.
        quantized_bytes: of those layers, block constants included.
        dense_bytes: of everything else.
        half_bytes: of the whole model if every weight were 16-bit.
        bits_per_param: of those layers.
        quantized_share: of all weights, how many are stored in few bits.
        stored: in which format the source had its weights in few bits, and how many of them; "" for a dense source.
        added_error: root mean square of what quantising these again changed, over that of the weights; None if it was
            not measured.
    """

    source: str
    quantized: tuple[str, ...]
    dense: dict[str, str] = field(default_factory=dict)
    quantized_bytes: int = 0
    dense_bytes: int = 0
    half_bytes: int = 0
    bits_per_param: float = 0.0
    quantized_share: float = 0.0
    stored: str = ""
    added_error: float | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights together."""
        return self.quantized_bytes + self.dense_bytes

    def __str__(self) -> str:
        """Say in one line a reason what is quantised and what is not."""
        sizes = f"{self.total_bytes / 1e6:,.0f} MB of weights ({self.half_bytes / 1e6:,.0f} in 16 bits)"
        lines = [f"{sizes}; {len(self.quantized)} layers in {self.bits_per_param:.2f} bits a parameter"]
        if not self.quantized:
            lines = [f"{sizes}; no layer is quantised"]
        if self.stored:
            lines.append(self._stored_line())
        for reason in dict.fromkeys(self.dense.values()):
            names = [name for name, why in self.dense.items() if why == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"not quantised: {', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines)

    def _stored_line(self) -> str:
        if not self.quantized:
            return f"de-quantised: {self.stored}"
        error = (
            "not measured" if self.added_error is None else f"{self.added_error:.2%} of the weights' root mean square"
        )
        return f"de-quantised and quantised again: {self.stored}; error that this adds: {error}"


def load(
    name: str | os.PathLike[str],
    *,
    quant: str = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    int8_threshold: float | None = None,
    int8_modules: list[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    skip_modules: list[str] | None = None,
    own_rows: OwnRows | None = None,
    resize_embeddings: bool = False,
    start: str = "standard",
    start_rank: int = 16,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        name: hub id, folder in Hugging Face format, or ``.gguf`` file. Of what is quantised already, bitsandbytes'
            bytes are kept; FP8, MXFP4, GPTQ, AWQ and compressed-tensors are de-quantised weight by weight and quantised
            to ``quant``.
        quant: ``"nf4"``, ``"fp4"``, ``"int4"``, ``"int8"`` (one constant a row), or ``"none"`` for dense weights.
        double_quant: quantise the block constants again.
        block_size: weights per block constant; of 4-bit types.
        int8_threshold: multiply 8-bit weights in integers, activations of this magnitude and above in 16 bits
            (LLM.int8(): 6; 0: none); None multiplies by de-quantised weights.
        int8_modules: full names of layers to store in 8 bits in a base of 4 bits, as `quant_plan` finds them.
        dtype: of dense weights and of matmuls; by default the one the device multiplies fast: bfloat16, or float32 on a
            processor without bf16 instructions, or float16 on a card without bfloat16.
        device: where the weights go; the first CUDA device if there is one, else the CPU.
        skip_modules: names of linear layers to leave dense.
        own_rows: of this device, where several share the quantised weights (``OwnRows``); the others are not kept.
        resize_embeddings: give tokens that the embedding lacks a row, the mean of the others; else they are an error.
        start: ``"loftq"``: ``add_adapters`` begins with the low-rank part of what rounding lost; the base is the same.
        start_rank: of those adapters.
    Returns: the model in eval mode and its tokenizer; ``longfit.reports(model).load`` tells what was done.
    Raises: ModelError: nothing at ``name``, not a causal language model, or an unknown ``quant``.
    """
    if quant not in (*QUANT_TYPES, "none"):
        raise ModelError(f"quant={quant!r}: must be one of {', '.join(QUANT_TYPES)} or none")
    if int8_threshold is not None and quant != "int8":
        raise ModelError(f"int8_threshold={int8_threshold:g} only acts with quant='int8'; drop it, or choose int8")
    require_start(start, quant=quant)
    if start != "standard" and own_rows is not None:
        raise ModelError(f"start={start!r} with shared weights: each device would need the whole; use shard 1")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or auto_dtype(device)[0]
    path = Path(name)
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if quant != "none":
        arguments["quantization_config"] = LongfitQuantizationConfig(
            quant_type=quant,
            block_size=block_size,
            double_quant=double_quant,
            skip_modules=skip_modules,
            int8_modules=int8_modules,
            threshold=int8_threshold,
        )
        arguments["quantization_config"].own_rows = own_rows
        arguments["quantization_config"].start_rank = None if start == "standard" else start_rank
    with reading(name, "the model", ModelError, do=CANNOT_LOAD):
        if gguf.is_gguf(path):
            loaded = _load_gguf(path, arguments)  # its tokens and its embedding are in one file
            return _settled(loaded, own_rows)
        if path.suffix == ".gguf":
            problem = "does not start with GGUF's magic bytes" if path.exists() else "no such file"
            raise ModelError(f"{path}: {problem}; give a .gguf file, a folder, or a hub id")
        return _settled(_load_safetensors(str(name), arguments, resize_embeddings=resize_embeddings), own_rows)


def _settled(loaded: tuple[Any, Any], own_rows: OwnRows | None) -> tuple[Any, Any]:
    if own_rows is not None:
        own_rows.settle(loaded[0])
    if getattr(loaded[0], "hf_quantizer", None) is not None:
        copy_out(loaded[0])
    return loaded


NOTHING_LOST = "what rounding lost is not in it; give the 16-bit model, or drop the start"
CANNOT_LOAD = "fetch it again, or give another model (--debug shows where it failed)"


EMBEDDED_ADAPTER = (
    "{name}: has an adapter_config.json beside its weights, which transformers would apply unasked; move the adapter "
    "into a folder of its own, or give a model without one"
)


def _load_gguf(path: Path, arguments: dict[str, Any]) -> tuple[Any, Any]:
    config, tokenizer = gguf.read_config(path), gguf.read_tokenizer(path)
    state_dict = gguf.lazy_state_dict(path, config)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    load = partial(model_class.from_pretrained, None, config=config, state_dict=state_dict)
    model = accounted(str(path), load, **arguments)
    model.config.name_or_path = str(path)
    require_rows(model, tokenizer, str(path), needed=gguf.num_tokens(path))
    return model, tokenizer


def _load_safetensors(name: str, arguments: dict[str, Any], *, resize_embeddings: bool) -> tuple[Any, Any]:
    """Load a folder or a hub id; the headers of a folder's weights are checked before anything is built."""
    config = read_config(name)
    if (Path(name) / "adapter_config.json").is_file():
        raise ModelError(EMBEDDED_ADAPTER.format(name=name))
    block = quantization_block(config)
    stored = None if block is None else foreign_format(name, block)
    if stored is not None:
        model = _load_stored(name, config, stored, arguments)
    else:
        if block is not None:
            if (asked := arguments.get("quantization_config")) is not None and asked.start_rank is not None:
                raise ModelError(f"{name}: quantised already: {NOTHING_LOST}")
            arguments["quantization_config"] = None
            config.quantization_config = prequantized(block).settings()
        if Path(name).is_dir():
            if not (headers := read_headers(Path(name))):
                raise ModelError(
                    f"{name}: has no model.safetensors, in one piece or in shards; longfit reads no pickled weights: "
                    "fetch the safetensors, or write them with transformers' save_pretrained"
                )
            require_fitting(headers, config, prequantized=block is not None)
        load = partial(
            AutoModelForCausalLM.from_pretrained, name, config=config, use_safetensors=True, trust_remote_code=False
        )
        model = _accounted(name, load, arguments)
    if getattr(model, "_hf_peft_config_loaded", False):  # of a hub id, whose files are only known now
        raise ModelError(EMBEDDED_ADAPTER.format(name=name))
    tokenizer = read_tokenizer(name)
    if resize_embeddings:
        add_rows(model, tokenizer, name)
    require_rows(model, tokenizer, name)
    return model, tokenizer


def _accounted(name: str, load: Any, arguments: dict[str, Any]) -> Any:
    try:
        return accounted(name, load, **arguments)
    except OSError as error:
        raise ModelError(f"{name}: {first_line(error)}") from error


def _load_stored(name: str, config: PretrainedConfig, stored: StoredFormat, arguments: dict[str, Any]) -> Any:
    """Load a folder or hub id whose weights are quantised in a foreign format, as if they were dense."""
    weights = StoredWeights(model_folder(name), stored)
    forget_quantization(config)
    require_fitting(weights.headers(), config, prequantized=False)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        weights.without_unread_biases([key for key, _ in model_class(config).named_parameters()])
    ours = arguments.get("quantization_config")
    added = None if ours is None else AddedError()
    if ours is not None:
        ours.added_error = added
    promises = weights.promises(arguments["dtype"])
    model = _accounted(
        name, partial(model_class.from_pretrained, None, config=config, state_dict=promises), dict(arguments)
    )
    model.config.name_or_path = name
    if (weights.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(weights.folder))
    words = f"{weights.num_quantized:,} weights of {stored.words}"
    vars(model)[_STORED] = (f"{words} ({stored.note})" if stored.note else words, added)
    return model


def auto_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """What the device multiplies fast, and why: ``processor.auto_dtype``; float16 on a card without bfloat16 (T4)."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16, "this card has no bfloat16"
    name, reason = processor.auto_dtype(device.type)
    return getattr(torch, name), reason


def quantization_block(config: PretrainedConfig) -> dict[str, Any] | None:
    """What a configuration says of how its checkpoint is quantised; None for a dense one."""
    for each in (config, config.get_text_config()):
        block = getattr(each, "quantization_config", None)
        if block is not None:
            return dict(block) if isinstance(block, dict) else dict(block.to_dict())
    return None


def forget_quantization(config: PretrainedConfig) -> None:
    """Let a configuration describe the dense model."""
    for each in (config, config.get_text_config()):
        if getattr(each, "quantization_config", None) is not None:
            del each.quantization_config


def foreign_format(name: str | os.PathLike[str], block: Mapping[str, Any]) -> StoredFormat | None:
    """The format of a checkpoint that is quantised already; None for one whose bytes longfit keeps as they are.

    Raises: ModelError: a format that longfit does not know in full.
    """
    method = block.get("quant_method")
    in_bits = ("load_in_4bit", "_load_in_4bit", "load_in_8bit", "_load_in_8bit")
    if method == "longfit" or (method == "bitsandbytes" and any(block.get(key) for key in in_bits)):
        return None
    return stored_format(str(name), block)


def prequantized(block: Mapping[str, Any]) -> LongfitQuantizationConfig:
    """The configuration for reading a checkpoint whose bytes are kept as they are."""
    if block.get("quant_method") == "bitsandbytes":
        return LongfitQuantizationConfig.from_bitsandbytes(dict(block))
    return LongfitQuantizationConfig(**block)


def load_report(model: Any) -> LoadReport:
    """Count what a loaded model stores and name what is not quantised, and why."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    experts = {name: (packed, leaf, rows) for name, packed, leaf, rows in packed_parameters(model)}
    tensors = [t for layer in layers.values() for t in (local_part(layer.weight), layer.constants)]
    for packed, leaf, rows in experts.values():
        tensors += [local_part(rows), getattr(packed, constants_of(leaf))]
    stored = {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}
    quantized_bytes = sum(tensor.nbytes for tensor in stored.values())
    quantized_params = sum(_own_params(layer) for layer in layers.values())
    quantized_params += sum(packed.numel(leaf) for packed, leaf, _ in experts.values())
    own = map(local_part, model.parameters())
    everything = {tensor.data_ptr(): tensor for tensor in own if tensor.data_ptr() not in stored}
    dense_bytes = sum(tensor.nbytes for tensor in everything.values())
    dense_params = sum(tensor.numel() for tensor in everything.values())
    stored, added = vars(model).get(_STORED, ("", None))
    return LoadReport(
        source=str(getattr(model.config, "name_or_path", "")),
        quantized=(*layers, *experts),
        dense=dense_reasons(model),
        quantized_bytes=quantized_bytes,
        dense_bytes=dense_bytes,
        half_bytes=2 * (quantized_params + dense_params),
        bits_per_param=8 * quantized_bytes / quantized_params if quantized_params else 16.0,
        quantized_share=quantized_params / max(1, quantized_params + dense_params),
        stored=stored,
        added_error=None if added is None else added.relative(),
    )


def _own_params(layer: QuantizedLinear) -> int:
    """Weights of a layer that this process has: those of its rows, unless all are in one row of bytes."""
    rows = local_part(layer.weight).shape[0]
    return layer.in_features * (layer.out_features if layer.weight.shape[0] == 1 else rows)


def dense_reasons(model: Any) -> dict[str, str]:
    """Matrices that are not quantised, each with its reason."""
    quantizer = getattr(model, "hf_quantizer", None)
    reasons = dict(quantizer.skipped) if quantizer is not None else {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            reasons[name] = "embeddings are looked up, not multiplied"
        elif isinstance(module, nn.Linear | Conv1D) and not isinstance(module, QuantizedLinear):
            reasons.setdefault(name, "loaded with quant='none'")
    packed = {name for name, *_ in packed_parameters(model)}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 2 and name not in packed:
            reasons.setdefault(name, f"a {parameter.dim()}-dimensional parameter, not a linear layer")
    return reasons


def first_line(error: Exception) -> str:
    """The first line of a message of another library."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
