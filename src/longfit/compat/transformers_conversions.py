"""The private names of transformers' weight conversions that longfit uses: how files and models name their tensors.

A family's files may have other tensors than its model: one for each expert where the model stacks them, q, k and v in
one. transformers converts them on loading and back on saving.
"""

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


@dataclass(frozen=True)
class Converted:
    """Tensors of a file that become tensors of a model together.

    Attributes:
        first: the model's tensor, the first where there are several.
        sources: names in the file, each with the pattern that it matches, in the order of conversion.
        converter: None where a tensor only has another name.
    """

    first: str
    sources: tuple[tuple[str, str], ...]
    converter: Any

    def targets(self, names: set[str]) -> list[str]:
        """The model's tensors that it makes, of all that the model has."""
        if self.converter is None:
            return [self.first]
        patterns = self.converter.target_patterns
        found = [self.first.replace(patterns[0], pattern) for pattern in patterns]
        return [name for name in found if name in names]

    def convert(self, model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors, made from the file's."""
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first, name, pattern, tensors[name])
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def conversions(model: Any, files: list[str]) -> list[Converted]:
    """How transformers makes a model's tensors of a file's.

    Args:
        model: may be on the meta device.
        files: names of the file's tensors.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    names = model.state_dict()
    found: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for file_name in sorted(files, key=dot_natural_key):
        name, pattern = rename_source_key(file_name, renamings, converters, model.base_model_prefix, names)
        if name not in names and file_name in names:
            name, pattern = file_name, None
        converter = None if pattern is None else by_pattern[pattern]
        found.setdefault(name, (converter, []))[1].append((file_name, pattern or file_name))
    return [Converted(first, tuple(sources), converter) for first, (converter, sources) in found.items()]


def converted_back(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors, made from the model's."""
    made: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return made
