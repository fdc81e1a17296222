"""Evaluating a swept model tile by tile, so that no layer holds activations of the whole sequence."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from longfit.engine.model_state import preserve_modes
from longfit.engine.sweep.sweeper import sweeper_of


@contextmanager
def swept_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluate a swept model tile by tile: no layer holds activations of the whole sequence.

    Layers call the checkpointing function only in training mode and, in some versions of transformers, with gradients
    on. So the layers themselves, not what is in them, are put into that mode, and gradients are on from the call of a
    layer to that function: dropout stays off, and shifted attention stays exact. Nothing is recorded for backward.
    """
    sweeper = sweeper_of(model)
    layers = [] if sweeper is None else list(sweeper.swept)
    with preserve_modes(model.modules()), ExitStack() as ends, torch.no_grad():
        model.eval()
        if sweeper is not None:
            ends.enter_context(sweeper.evaluating())
        for layer in layers:
            layer.training = True
            on = layer.register_forward_pre_hook(lambda *_: _gradients(True))
            off = layer.register_forward_hook(lambda *_: _gradients(False), always_call=True)
            ends.callback(on.remove)
            ends.callback(off.remove)
        yield


def _gradients(on: bool) -> None:
    """Turn gradients on or off; as a hook it returns nothing that would replace what passes it."""
    torch.set_grad_enabled(on)
