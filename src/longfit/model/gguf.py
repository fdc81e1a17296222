"""Read a GGUF file as if it were a Hugging Face checkpoint: configuration, tokenizer, and tensors that are read when
asked for.

transformers knows the configurations, tokenizers and weight layouts of GGUF architectures, but its loader unpacks the
whole file before it quantises anything. Here every tensor is a promise (``LazyTensor``): the loader asks for one,
gets it de-quantised from GGUF's blocks, turns it into NF4, and forgets it, so a file never costs more memory than its
largest tensor.

A GGUF file is a source here, not a format to train in: its own block quantisation is undone before NF4 is applied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf import dequantize as gguf_dequantize
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from longfit.compat.transformers import tied_weights
from longfit.errors import ModelError
from longfit.files.gguf_header import MAGIC, read_header, require_whole_tensors
from longfit.files.reading import reading
from longfit.model.gguf_config import complete_config
from longfit.model.gguf_positions import read_positions
from longfit.model.gguf_split_rules import follow_rule
from longfit.model.weight_files import require_sane_counts

_INTEGERS = frozenset(kind.value for kind in GGMLQuantizationType if kind.name in ("I8", "I16", "I32", "I64"))
ROPE_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tables beside the weights, which the configuration stands for."""
SLICE_ELEMENTS = 1 << 20  # 4 MiB of fp32: small beside any layer, large enough that the calls do not show


class LazyTensor:
    """A tensor of a GGUF file under its Hugging Face name; indexing it reads and de-quantises it.

    The loader of transformers indexes a checkpoint entry with ``[...]`` exactly when it needs the values.
    """

    def __init__(self, tensor: Any, processor: Any, *, name: str | None = None) -> None:
        # Not the tensor itself: it would keep the reader alive, and with it the vocabulary as Python objects.
        self._name, self._data, self._type = tensor.name, tensor.data, tensor.tensor_type
        self._name = self._name if name is None else name  # under which the processor knows it
        self._processor = processor
        self.shape = torch.Size(int(n) for n in reversed(tensor.shape))
        self.dtype = torch.float32

    def __getitem__(self, index: Any) -> Tensor:
        weights = self._processor.process(weights=self._dequantized(), name=self._name).weights
        return torch.from_numpy(weights)[index]

    def _dequantized(self) -> np.ndarray:
        """fp32 values, unpacked a slice of rows at a time: at once, gguf would need the memory twice."""
        if self._data.ndim < 2:
            return np.array(gguf_dequantize(self._data, self._type), dtype=np.float32)
        weights = np.empty(tuple(self.shape), dtype=np.float32)
        step = max(1, SLICE_ELEMENTS // max(1, weights[0].size))
        for start in range(0, len(weights), step):
            rows = slice(start, start + step)
            weights[rows] = gguf_dequantize(self._data[rows], self._type)
        return weights

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return "F32"


def is_gguf(path: Path) -> bool:
    """True for a file that starts with GGUF's magic bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_config(path: Path) -> PretrainedConfig:
    """The model configuration that the file's metadata describes.

    Raises:
        ModelError: the file is cut short, or of an architecture that transformers cannot build.
    """
    require_whole(path)
    with reading(path, "the GGUF model", ModelError, do="give one that transformers can build"):
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        complete_config(path, config)
        read_positions(path, config)
    require_sane_counts(str(path), config.to_dict())
    if "quantization_config" in config.to_dict():
        del config.quantization_config
    return config


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer stored in the file.

    Raises: ModelError: there is none, it is damaged, or how it splits a text is not known.
    """
    from transformers import AutoTokenizer

    with reading(path, "the tokenizer", ModelError):
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        follow_rule(tokenizer, read_header(path).keys, str(path))
        return tokenizer


def num_tokens(path: Path) -> int | None:
    """Tokens in the file's vocabulary; None where it has none."""
    tokens = read_header(path).keys.get("tokenizer.ggml.tokens")
    return None if tokens is None else len(tokens) if isinstance(tokens, list) else int(tokens)


def require_whole(path: Path) -> None:
    """Raise ModelError unless the header is sound and every tensor lies where the format says, in a known type."""
    header = read_header(path)
    require_whole_tensors(path, header, {kind.value: GGML_QUANT_SIZES[kind] for kind in GGML_QUANT_SIZES})
    for name, tensor in header.tensors.items():
        if tensor.type in _INTEGERS:
            raise ModelError(
                f"{path}: {name} holds {GGMLQuantizationType(tensor.type).name}, no weights; fetch it again"
            )


def lazy_state_dict(path: Path, config: PretrainedConfig) -> dict[str, LazyTensor]:
    """Hugging Face names to tensors that have not been read yet.

    Raises:
        ModelError: the file's tensors do not have the names that this architecture should have.
    """
    reader = GGUFReader(str(path))
    skeleton, names, processor = _names_of(reader, config)
    state_dict = {
        names[tensor.name]: LazyTensor(tensor, processor) for tensor in reader.tensors if tensor.name in names
    }
    unknown = [tensor.name for tensor in reader.tensors if tensor.name not in names and tensor.name not in ROPE_TENSORS]
    if unknown:
        raise ModelError(
            f"{path}: {len(unknown)} tensors that a {config.model_type} does not have, first {unknown[0]!r}; without "
            "them it would be another model: fetch it again, or give the safetensors of the model"
        )
    missing = sorted(set(skeleton.state_dict()) - set(state_dict) - set(tied_weights(skeleton)))
    if missing:
        raise ModelError(f"{path}: {len(missing)} tensors of {config.model_type} are missing, first {missing[0]!r}")
    return state_dict


def lora_state_dict(path: Path, config: PretrainedConfig) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """Hugging Face names of weights to the A and B of an adapter's file; the rows of B are in the order of the weight.

    Raises:
        ModelError: the file has tensors that are neither, or one of the two alone.
    """
    reader = GGUFReader(str(path))
    _, names, processor = _names_of(reader, config)
    found: dict[str, dict[str, LazyTensor]] = {}
    for tensor in reader.tensors:
        weight, _, part = tensor.name.rpartition(".")
        if weight not in names or part not in ("lora_a", "lora_b"):
            raise ModelError(f"{path}: {tensor.name} is no part of an adapter of {config.model_type}")
        # A has the columns of the weight, which stay as they are; no processor knows a tensor without a name.
        plain = LazyTensor(tensor, processor, name=weight if part == "lora_b" else "")
        found.setdefault(names[weight], {})[part] = plain
    alone = [name for name, parts in found.items() if len(parts) < 2]
    if alone:
        raise ModelError(f"{path}: {alone[0]} has only one of A and B")
    return {name: (parts["lora_a"], parts["lora_b"]) for name, parts in found.items()}


def _names_of(reader: GGUFReader, config: PretrainedConfig) -> tuple[Any, dict[str, str], Any]:
    """The model without memory, its names of the file's tensors, and what puts their values into its order."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    architecture = reader.get_field("general.architecture")
    processor_class = TENSOR_PROCESSORS.get(architecture.contents() if architecture else None, TensorProcessor)
    processor = processor_class(config=config.to_dict())
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    return skeleton, get_gguf_hf_weights_map(skeleton, processor), processor
