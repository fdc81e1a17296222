"""Putting a model's modes and settings aside and back: what the engine changes in a model, and only that.

modes       training or evaluation, per module
engine      whether and by which function layers are checkpointed, and whether the owner wants plain autograd
attention   the implementation that transformers' configuration names
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from longfit.compat.transformers import CHECKPOINTING, attention_of
from longfit.engine.hf_model import base_model

_MODE = ("training",)
_ENGINE = (*CHECKPOINTING, "_longfit_plain")


class ModelState:
    """Modes, engine and attention of a model as they are now; ``restore`` goes back to them."""

    def __init__(self, model: nn.Module) -> None:
        self._base = base_model(model)
        self._attention = attention_of(self._base)
        self._attributes = _Attributes(model.modules(), (*_MODE, *_ENGINE))

    def restore(self) -> None:
        """Go back to this state."""
        self._attributes.restore()
        if attention_of(self._base) != self._attention:
            self._base.set_attn_implementation(self._attention)


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Leave modes, engine and attention of a model as they were before, whatever happens inside."""
    before = ModelState(model)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def preserve_modes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leave training or evaluation mode of just these modules as it was before, whatever happens inside."""
    before = _Attributes(modules, _MODE)
    try:
        yield
    finally:
        before.restore()


class _Attributes:
    """Some attributes of some modules; one that was not a module's own falls back to its class."""

    def __init__(self, modules: Iterable[nn.Module], names: tuple[str, ...]) -> None:
        self._names = names
        self._found: list[tuple[nn.Module, dict[str, Any]]] = [
            (module, {name: vars(module)[name] for name in names if name in vars(module)}) for module in modules
        ]

    def restore(self) -> None:
        for module, values in self._found:
            for name in self._names:
                vars(module).pop(name, None)
            vars(module).update(values)
