"""Read a GGUF file as if it were a Hugging Face checkpoint: configuration, tokenizer, and tensors that are read when
asked for.

transformers knows the configurations, tokenizers and weight layouts of GGUF architectures, but its loader unpacks the
whole file before it quantises anything. Here every tensor is a promise (``LazyTensor``): the loader asks for one,
gets it de-quantised from GGUF's blocks, turns it into NF4, and forgets it, so a file never costs more memory than its
largest tensor.

A GGUF file is a source here, not a format to train in: its own block quantisation is undone before NF4 is applied.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf import dequantize as gguf_dequantize
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from longfit.errors import ModelError

MAGIC = b"GGUF"
SLICE_ELEMENTS = 1 << 20  # 4 MiB of fp32: small beside any layer, large enough that the calls do not show


class LazyTensor:
    """A tensor of a GGUF file under its Hugging Face name; indexing it reads and de-quantises it.

    The loader of transformers indexes a checkpoint entry with ``[...]`` exactly when it needs the values.
    """

    def __init__(self, tensor: Any, processor: Any) -> None:
        # Not the tensor itself: it would keep the reader alive, and with it the vocabulary as Python objects.
        self._name, self._data, self._type = tensor.name, tensor.data, tensor.tensor_type
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
    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except (ValueError, KeyError, IndexError, NotImplementedError, struct.error) as error:
        raise ModelError(f"{path}: not a GGUF model that transformers can build ({error})") from error
    if "quantization_config" in config.to_dict():
        del config.quantization_config
    return config


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer stored in the file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def lazy_state_dict(path: Path, config: PretrainedConfig) -> dict[str, LazyTensor]:
    """Hugging Face names to tensors that have not been read yet.

    Raises:
        ModelError: the file's tensors do not have the names that this architecture should have.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    reader = GGUFReader(str(path))
    architecture = reader.get_field("general.architecture")
    processor_class = TENSOR_PROCESSORS.get(architecture.contents() if architecture else None, TensorProcessor)
    processor = processor_class(config=config.to_dict())
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    names = get_gguf_hf_weights_map(skeleton, processor)
    state_dict = {
        names[tensor.name]: LazyTensor(tensor, processor) for tensor in reader.tensors if tensor.name in names
    }
    missing = sorted(set(skeleton.state_dict()) - set(state_dict) - set(skeleton.all_tied_weights_keys))
    if missing:
        raise ModelError(f"{path}: {len(missing)} tensors of {config.model_type} are missing, first {missing[0]!r}")
    return state_dict
