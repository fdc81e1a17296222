"""A folder whose weights are quantised already, read as if it held the dense ones.

The tensors that stand for a weight are known from the files' headers; they are read and de-quantised when the weight
is asked for, a slice of its rows at a time, and nothing stays. So transformers' loader, with all that it renames,
stacks and fuses, sees a dense checkpoint, and longfit quantises what it makes: no more memory than a dense one takes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from longfit.errors import ModelError
from longfit.model.stored_formats import Stored, StoredFormat
from longfit.model.weight_files import FLOATS, TensorHeader, read_headers

SLICE_ELEMENTS = 1 << 22
"""Weights that are de-quantised at once: three fp32 copies of a slice are 48 MiB, small beside any layer."""
MARKED = {"F8_E4M3"}
SCALE_TYPES = FLOATS | {"F8_E8M0"}


class StoredWeights:
    """Dense names to weights that have not been read.

    Attributes:
        folder: of the files.
        format: of what is quantised.
    """

    def __init__(self, folder: Path, stored_format: StoredFormat) -> None:
        """Read headers, nothing else.

        Raises: ModelError: a file is damaged, or parts of a weight are missing.
        """
        self.folder, self.format = folder, stored_format
        self._headers = read_headers(folder)
        if not self._headers:
            raise ModelError(f"{folder}: no safetensors files; longfit reads quantised checkpoints from those only")
        self._kinds: dict[str, tuple[str, Stored]] = {}  # dense name -> what its parts begin with, how it lies
        self._files: dict[Path, Any] = {}
        used: set[str] = set()
        for name in self._headers:
            for kind in stored_format.kinds:
                stem = name.removesuffix(kind.parts[0])
                if stem != name and self._is(kind, stem):
                    self._kinds[stem + kind.ending] = stem, kind
                    used |= {stem + part for part in kind.parts}
                    layer = stem if kind.ending else stem.rpartition(".")[0]
                    used |= {layer + part for part in kind.unused}
        self._plain = [name for name in self._headers if name not in used]

    def names(self) -> list[str]:
        """All weights, under the names that a dense checkpoint has for them."""
        return [*self._plain, *self._kinds]

    @property
    def num_quantized(self) -> int:
        """Weights that are stored in few bits."""
        return len(self._kinds)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the dense weight."""
        if name not in self._kinds:
            return self._headers[name].shape
        stem, kind = self._kinds[name]
        try:
            shape = kind.shape(_Parts(self, stem))
        except (ValueError, KeyError, IndexError) as error:
            raise self._damaged(name, error) from error
        if len(shape) < 2 or min(shape) < 1:
            raise self._damaged(name, f"shape {list(shape)}")
        return shape

    def headers(self) -> dict[str, TensorHeader]:
        """What the headers of a dense checkpoint would say."""
        made = {name: self._headers[name] for name in self._plain}
        for name, (stem, kind) in self._kinds.items():
            made[name] = TensorHeader("BF16", self.shape(name), self._headers[stem + kind.parts[0]].file)
        return made

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A weight on the CPU: one that was quantised in ``dtype``, any other as it is stored.

        Raises: ModelError: its parts do not belong together.
        """
        if name not in self._kinds:
            return self._tensor(name)
        stem, kind = self._kinds[name]
        shape = self.shape(name)
        parts = {part: self._tensor(stem + part) for part in kind.parts if stem + part in self._headers}
        weight = torch.empty(shape, dtype=dtype)
        step = max(1, SLICE_ELEMENTS // max(1, math.prod(shape[1:])) // kind.step) * kind.step
        try:
            for start in range(0, shape[0], step):
                stop = min(start + step, shape[0])
                weight[start:stop] = kind.rows(parts, start, stop)
        except (ValueError, RuntimeError, IndexError) as error:
            raise self._damaged(name, error) from error
        return weight

    def promises(self, dtype: torch.dtype) -> dict[str, Promise]:
        """Every weight as the entry of a checkpoint that is read when it is indexed."""
        return {name: Promise(self, name, dtype) for name in self.names()}

    def _is(self, kind: Stored, stem: str) -> bool:
        """Whether the parts of a weight are there.

        Raises: ModelError: some are.
        """
        if kind.ending == "" and "" in kind.parts:  # a scale beside a weight that has its own name
            header = self._headers.get(stem)
            if header is None or header.dtype not in MARKED:
                return False
            scale = self._headers[stem + kind.parts[0]]
            if scale.dtype not in SCALE_TYPES:
                raise ModelError(f"{scale.file}: {stem}{kind.parts[0]} holds {scale.dtype}; scales are floats")
        missing = [part for part in kind.parts if part not in kind.optional and stem + part not in self._headers]
        if missing:
            raise ModelError(
                f"{self._headers[stem + kind.parts[0]].file}: {stem + kind.parts[0]} is there, {stem + missing[0]} is "
                "not; fetch the folder again"
            )
        return True

    def without_unread_biases(self, known: Collection[str]) -> None:
        """Forget biases of zeros: older tools write one for every layer, and the model has no place for them.

        Args:
            known: names of the model's parameters.
        """
        biases = {stem + ".bias" for stem, kind in self._kinds.values() if kind.ending}
        for name in [name for name in self._plain if name in biases and name not in known]:
            if not bool(self._tensor(name).any()):
                self._plain.remove(name)

    def _tensor(self, name: str) -> Tensor:
        path = self._headers[name].file
        if path not in self._files:
            self._files[path] = safe_open(str(path), framework="pt")
        tensor: Tensor = self._files[path].get_tensor(name)
        return tensor

    def _damaged(self, name: str, why: object) -> ModelError:
        stem, kind = self._kinds[name]
        file = self._headers[stem + kind.parts[0]].file
        return ModelError(f"{file}: the parts of {name} do not fit together ({why}); fetch the folder again")


class _Parts:
    """What is known of the parts of one weight."""

    def __init__(self, weights: StoredWeights, stem: str) -> None:
        self._weights, self._stem = weights, stem

    def shape(self, part: str) -> tuple[int, ...]:
        return self._weights._headers[self._stem + part].shape

    def value(self, part: str) -> Tensor:
        return self._weights._tensor(self._stem + part)


class Promise:
    """A weight that is read when it is indexed, as transformers' loader does when it needs the values."""

    def __init__(self, weights: StoredWeights, name: str, dtype: torch.dtype) -> None:
        self._weights, self._name, self._dtype = weights, name, dtype
        self.shape, self.dtype = torch.Size(weights.shape(name)), dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self._weights.read(self._name, self._dtype)[index]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return {torch.float16: "F16", torch.bfloat16: "BF16"}.get(self._dtype, "F32")
