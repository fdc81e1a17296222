"""The weights of a base, one tensor at a time, under the names that the model has for them.

    FolderWeights       safetensors in a folder or a hub snapshot; bitsandbytes' 4-bit tensors are de-quantised
    StoredWeights       safetensors quantised by another tool (``model/stored_weights.py``)
    GgufWeights         a .gguf file
    GrownWeights        another base with rows for new tokens, which the adapter then fills
    HeldWeights         another base as a run held it: what is dense rounded to the run's dtype
    QuantizedWeights    such a base as it was while the adapter trained: quantised and de-quantised again

Nothing is read before it is asked for, nothing stays: the files are mapped, so a model of any size costs the tensors
that the caller holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from longfit.errors import ExportError, ModelError
from longfit.files.reading import reading
from longfit.kernels.dispatch import dequantize_4bit, quantize_4bit
from longfit.model import gguf
from longfit.model.description import read_config
from longfit.model.hf_quantizer import all_linears, skipped_linears
from longfit.model.load import foreign_format, quantization_block
from longfit.model.pack_experts import packable_experts, skipped_experts
from longfit.model.stored_weights import StoredWeights
from longfit.model.vocabulary import grown
from longfit.model.weight_files import model_folder, read_headers
from longfit.numerics.bitsandbytes_format import from_bitsandbytes
from longfit.numerics.vectorwise import dequantize_vectors, quantize_vectors


class BaseWeights(Protocol):
    """A base that is read tensor by tensor."""

    def names(self) -> list[str]:
        """All tensors that are there, under the model's names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the dense tensor."""

    def read(self, name: str) -> Tensor:
        """The dense tensor on the CPU, in the precision that it is stored in."""


def open_base(name: str, config: Any) -> BaseWeights:
    """Open a base for reading; ``config`` is its configuration."""
    with reading(name, "the base", ModelError, do="fetch it again"):
        if gguf.is_gguf(Path(name)):
            return GgufWeights(Path(name), config)
        folder = model_folder(name, error=ExportError, do="say where with --base PATH")
        block = _quantization_block(folder)
        stored = None if block is None else foreign_format(name, block)
        return FolderWeights(folder) if stored is None else StoredWeights(folder, stored)


def _quantization_block(folder: Path) -> dict[str, Any] | None:
    """How a folder's weights are quantised; None where they are dense, or where there is no configuration."""
    path = folder / "config.json"
    return quantization_block(read_config(folder)) if path.is_file() else None


class FolderWeights:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        self._where: dict[str, Any] = {}
        read_headers(folder)  # that they are whole
        for path in _safetensors_files(folder):
            file = safe_open(str(path), framework="pt")
            self._where.update(dict.fromkeys(file.keys(), file))
        eight = [key for key in self._where if key.endswith(".SCB")]
        if eight:
            raise ExportError(f"{folder}: {eight[0]}: a checkpoint in 8 bits; merge onto the original with --base PATH")
        # "p.weight.absmax" and its kin belong to the 4-bit tensor "p.weight" (numerics/bitsandbytes_format.py).
        self._parts: dict[str, list[str]] = {}
        for key in self._where:
            if ".quant_state.bitsandbytes__" in key:
                self._parts[key.split(".quant_state.")[0]] = []
        for key in self._where:
            owner = key if key in self._parts else _owner(key, self._parts)
            if owner is not None:
                self._parts[owner].append(key)

    @property
    def in_few_bits(self) -> frozenset[str]:
        """Names of the tensors that are stored in 4 bits."""
        return frozenset(self._parts)

    def names(self) -> list[str]:
        parts = {key for keys in self._parts.values() for key in keys}
        return [key for key in self._where if key not in parts or key in self._parts]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._parts:
            return self._packed(name)[1].shape
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._where[name].get_tensor(name)
        packed, state = self._packed(name)
        return dequantize_4bit(packed, state, torch.float32)

    def _packed(self, name: str) -> tuple[Tensor, Any]:
        tensors = {
            "weight" if key == name else key.removeprefix(f"{name}."): self._where[key].get_tensor(key)
            for key in self._parts[name]
        }
        return from_bitsandbytes(tensors)


def _owner(key: str, packed: dict[str, list[str]]) -> str | None:
    """The 4-bit tensor that a file's tensor is a part of."""
    stem, _, leaf = key.rpartition(".")
    if leaf.startswith("bitsandbytes__"):
        stem = stem.removesuffix(".quant_state")
    return stem if stem in packed else None


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ExportError(f"{folder}: {missing[0]} is not there; longfit reads models in safetensors")
    return files


class GgufWeights:
    """See the module."""

    def __init__(self, path: Path, config: Any) -> None:
        self.path = path
        self._tensors = gguf.lazy_state_dict(path, config)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self._tensors[name][...]


class _Wrapped:
    """A base whose tensors are those of another, read in a way of its own."""

    def __init__(self, inner: BaseWeights) -> None:
        self.inner = inner

    def names(self) -> list[str]:
        return self.inner.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(name)


class GrownWeights(_Wrapped):
    """See the module; ``tables`` are the tensors that have ``rows`` rows in the model and fewer in the base."""

    def __init__(self, inner: BaseWeights, tables: set[str], *, rows: int) -> None:
        super().__init__(inner)
        self.tables, self.rows = tables, rows

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.inner.shape(name)
        return (max(shape[0], self.rows), *shape[1:]) if name in self.tables else shape

    def read(self, name: str) -> Tensor:
        weight = self.inner.read(name)
        return grown(weight, self.rows) if name in self.tables else weight


class HeldWeights(_Wrapped):
    """See the module; ``in_few_bits`` are the tensors that are stored in few bits, which no dtype rounds."""

    def __init__(self, inner: BaseWeights, dtype: torch.dtype, *, in_few_bits: frozenset[str] = frozenset()) -> None:
        super().__init__(inner)
        self.dtype, self.in_few_bits = dtype, in_few_bits

    def read(self, name: str) -> Tensor:
        weight = self.inner.read(name)
        return weight if name in self.in_few_bits else weight.to(self.dtype)


class QuantizedWeights(_Wrapped):
    """See the module.

    Attributes:
        quantized: names of the weights that pass through few bits; stacked experts do so one by one.
        int8: those of them through 8.
        transposed: those of them that are stored the other way round (`Conv1D`).
    """

    def __init__(
        self,
        inner: BaseWeights,
        quantized: set[str],
        *,
        quant: str,
        double_quant: bool,
        block_size: int,
        int8: set[str],
        transposed: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(inner)
        self.quantized, self.int8 = quantized, quantized if quant == "int8" else int8
        self.transposed = transposed
        self._settings: dict[str, Any] = {"quant_type": quant, "double_quant": double_quant, "block_size": block_size}

    def read(self, name: str) -> Tensor:
        weight = self.inner.read(name)
        if name not in self.quantized:
            return weight
        if name in self.transposed:
            return self._rounded(name, weight.t().contiguous()).t()
        if weight.dim() == 3:
            return torch.stack([self._rounded(name, expert) for expert in weight])
        return self._rounded(name, weight)

    def _rounded(self, name: str, weight: Tensor) -> Tensor:
        if name in self.int8:
            return dequantize_vectors(*quantize_vectors(weight), dtype=torch.float32)
        packed, state = quantize_4bit(weight, **self._settings)
        return dequantize_4bit(packed, state, torch.float32)


def quantized_weights(skeleton: Any, skip_modules: list[str] | None = None) -> set[str]:
    """Names of the weights that ``load`` puts into 4 bits, told from a model without memory."""
    skipped = skipped_linears(skeleton, skip_modules or [])
    return {f"{name}.weight" for name, _ in all_linears(skeleton) if name not in skipped}


def quantized_experts(skeleton: Any, skip_modules: list[str] | None = None) -> set[str]:
    """Names of the stacked experts that ``load`` puts into few bits."""
    skipped = skipped_experts(skeleton, skip_modules or [])
    return {f"{path}.{name}" for path, _, names in packable_experts(skeleton, skipped) for name in names}


def conv1d_weights(skeleton: Any) -> frozenset[str]:
    """Names of the weights ``[I, O]`` of transformers' ``Conv1D``."""
    return frozenset(f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, Conv1D))
