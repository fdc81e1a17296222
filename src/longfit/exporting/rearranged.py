"""A base whose files have other tensors than its model: read as the model has them, written back as the files had.

A file has a tensor for each expert, the model one for all of a layer; transformers knows how the two become each other
(``compat/transformers_conversions.py``). Here that is done for one of the model's tensors at a time, and a merged model
is written under the names of the base's files, which every server reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longfit.compat.transformers_conversions import Converted, conversions, converted_back
from longfit.errors import ExportError
from longfit.exporting.base_weights import BaseWeights
from longfit.exporting.shards import Planned


class RearrangedWeights:
    """A base under the names and shapes of its model.

    Args:
        inner: the base under the names of its files.
        model: of its configuration, on the meta device.
    """

    def __init__(self, inner: BaseWeights, model: Any) -> None:
        self._inner, self._model = inner, model
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        groups = conversions(model, inner.names())
        self._groups = {name: group for group in groups for name in group.targets(set(self._shapes))}

    def names(self) -> list[str]:
        """The model's tensors that the files have."""
        return list(self._groups)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the model's tensor; that the file's are of such a shape is seen when they are read."""
        group = self._groups[name]
        return self._inner.shape(group.sources[0][0]) if group.converter is None else self._shapes[name]

    def read(self, name: str) -> Tensor:
        """Make a tensor of the model."""
        group = self._groups[name]
        if group.converter is None:
            return self._inner.read(group.sources[0][0])
        made = group.convert(self._model, {source: self._inner.read(source) for source, _ in group.sources})
        if tuple(made[name].shape) != self._shapes[name]:
            raise ExportError(
                f"{name}: the base makes {list(made[name].shape)} of its tensors, the trained model has "
                f"{list(self._shapes[name])}; this is another base"
            )
        return made[name]

    def in_files(
        self, planned: Sequence[Planned], make: Callable[[str], Tensor]
    ) -> tuple[list[Planned], Callable[[Planned], Tensor]]:
        """What to write for the model's tensors: the files' tensors, and a function that makes them in that order."""
        dtype = {each.name: each.dtype for each in planned}
        files: list[Planned] = []
        where: dict[str, Converted] = {}
        for each in planned:
            group = self._groups.get(each.name)
            if group is None:  # written by itself, as a head that is no longer tied
                files.append(each)
                continue
            if group.converter is not None and self._first(group, dtype) != each.name:
                continue
            for source, _ in group.sources:
                files.append(Planned(source, self._inner.shape(source), each.dtype))
                where[source] = group
        pending: dict[str, Tensor] = {}

        def made(file: Planned) -> Tensor:
            if file.name not in where:
                return make(file.name)
            if file.name not in pending:
                pending.clear()
                pending.update(self._back(where[file.name], make, dtype))
            return pending.pop(file.name)

        return files, made

    def _first(self, group: Converted, dtype: dict[str, torch.dtype]) -> str:
        return next(name for name in group.targets(set(self._shapes)) if name in dtype)

    def _back(
        self, group: Converted, make: Callable[[str], Tensor], dtype: dict[str, torch.dtype]
    ) -> dict[str, Tensor]:
        """The files' tensors of a group."""
        if group.converter is None:
            return {group.sources[0][0]: make(group.first)}
        targets = group.targets(set(self._shapes))
        made = converted_back(self._model, {name: make(name) for name in targets})
        expected = {source for source, _ in group.sources}
        if made.keys() != expected:
            raise ExportError(
                f"{targets[0]}: cannot be turned back into the base's own tensors, first {min(expected)}; "
                "load the run with PEFT and call merge_and_unload"
            )
        return {name: tensor.contiguous() for name, tensor in made.items()}
