"""After loading: no parameter is unset, none was made up, every key of the checkpoint is accounted for, all is finite.

transformers fills what a checkpoint lacks with random numbers and prints a table about it; a run would train on them.
Here the table's numbers are read, and anything but a complete model is refused by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longfit.errors import ModelError
from longfit.layers.experts import constants_of
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model.pack_experts import packed_parameters
from longfit.model.weight_files import BUFFERS

SHOWN = 3
OTHER_PARTS = re.compile(r"(^|\.)(vision\w*|visual|audio\w*|image\w*|multi_modal_projector|mm_projector|mtp)\.")
"""Parts of a multimodal checkpoint, and heads for predicting several tokens, that a text decoder does not have."""


def accounted(name: str, load: Callable[..., tuple[Any, dict[str, Any]]], **arguments: Any) -> Any:
    """Load a model with a ``from_pretrained`` of transformers and account for every key.

    Args:
        name: of the model, for messages.
        load: returns the model and what transformers knows about the loading.
    Returns: the model.
    Raises: ModelError: weights are missing, left over, of another shape, or not finite.
    """
    with _collected_reports() as reports:
        try:
            model, info = load(output_loading_info=True, **arguments)
        except RuntimeError as error:
            raise ModelError(f"{name}: {_from_report(reports, error)}") from error
    require_complete(name, info)
    require_finite(name, model)
    return model


def require_complete(name: str, info: Mapping[str, Any]) -> None:
    """Raise ModelError unless every parameter was read and every key was used or is known to be of no use."""
    missing = info["missing_keys"]
    packed = {constants for key in missing for constants in _constants_of(key)}  # come with their weight
    if missing := sorted(missing - packed):
        raise ModelError(
            f"{name}: the checkpoint lacks {_some(missing)}; training would start from random weights there: fetch it "
            "again, or give the whole model"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        key, got, expected = mismatched[0]
        raise ModelError(
            f"{name}: {key} has shape {list(got)}, config.json describes {list(expected)}; "
            "the two are of different models: fetch the folder again"
        )
    unused = sorted(key for key in info["unexpected_keys"] if not BUFFERS.search(key) and not OTHER_PARTS.search(key))
    if unused:
        raise ModelError(
            f"{name}: the checkpoint has {_some(unused)}, which the model of its config.json does not have; without "
            "them it would be another model: fetch the folder again, or give the configuration that belongs to it"
        )


def _constants_of(key: str) -> tuple[str, str]:
    """The buffers that belong to a weight of a layer, and to one of stacked experts."""
    path, _, leaf = key.rpartition(".")
    return f"{path}.constants", f"{path}.packed.{constants_of(leaf)}"


def require_finite(name: str, model: Any) -> None:
    """Raise ModelError naming the first tensor that holds NaN or infinity, block constants included."""
    for key, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and not module.constants_finite():
            raise ModelError(not_finite(name, f"{key}.weight"))
    for key, packed, leaf, rows in packed_parameters(model):
        if not packed.constants_finite(leaf, rows):
            raise ModelError(not_finite(name, key))
    for key, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_finite(parameter):
            raise ModelError(not_finite(name, key))


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass, no memory: both extremes carry a NaN on."""
    if not values.numel() or values.is_meta:
        return True
    low, high = torch.aminmax(values.detach())
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def not_finite(name: str, key: str) -> str:
    """The message about a tensor that holds NaN or infinity."""
    return f"{name}: {key} holds NaN or infinity; the file is damaged or the model is broken: fetch it again"


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN:,} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


@contextmanager
def _collected_reports() -> Iterator[list[str]]:
    """Collect the tables that transformers would print about missing weights; what they say, we say."""
    logger, reports = logging.getLogger("transformers.modeling_utils"), []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reports.append(record.getMessage())

    collector, before = Collector(), logger.propagate
    logger.addHandler(collector)
    logger.propagate = False
    try:
        yield reports
    finally:
        logger.removeHandler(collector)
        logger.propagate = before


def _from_report(reports: list[str], error: RuntimeError) -> str:
    """Find in a table what went wrong with a tensor; else take the error's own text."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(reports))
    causes = re.findall(r"^\s*(?:\w+(?:\.\w+)*Error: )(.+)$", text, flags=re.MULTILINE)
    where = re.search(r"on tensors destined for (\w+(?:\.\w+)*)", text)
    cause = causes[-1] if causes else str(error).strip().splitlines()[0]
    place = f"{where[1]}: " if where and where[1] not in cause else ""
    return f"{place}{cause}; fetch the weights again"
