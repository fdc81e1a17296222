"""Which layers of a model can be swept: two tokens are run through the decoder, and every layer is watched.

A layer can be swept if it is run through the gradient-checkpointing function, passes keyword arguments down to exactly
one call of longfit's attention, and returns hidden states only. Asking the layer is more reliable than a list of
families.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longfit.attention.backends import tile_forward
from longfit.attention.spec import AttentionSpec
from longfit.attention.tile import QueryTile
from longfit.compat.transformers import set_checkpoint_function
from longfit.engine.model_state import preserve_modes
from longfit.engine.sweep.layer_call import LayerCall, layer_call
from longfit.engine.sweep.recompute_state import preserve_random_state


class _Probe:
    """Stands in for a tile of a pass: attends plainly and counts."""

    def __init__(self) -> None:
        self.num_calls = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        self.num_calls += 1
        batch, num_heads, num_tokens, _ = query.shape
        plain = AttentionSpec(scaling=spec.scaling, softcap=spec.softcap)
        schedule = plain.schedule(batch, num_heads, num_tokens, query.device)
        tile = QueryTile(query, key, value, schedule, 0, spec.scaling, spec.softcap)
        return tile_forward(tile)[0].transpose(1, 2)


def probe_layers(
    base: Any, inner: Any, device: torch.device, *, present: Callable[[nn.Module], AbstractContextManager[None]]
) -> dict[nn.Module, str | None]:
    """Run two tokens through the decoder and try to sweep every layer that is run through the checkpointing function.

    Args:
        base, inner: the model and its decoder.
        device: where the model computes.
        present: holds the weights of a layer while it runs.
    Returns: for each of those layers None, or why it cannot be swept.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    reasons: dict[nn.Module, str | None] = {}
    if not base.supports_gradient_checkpointing:
        return reasons

    def try_layer(function: Any, *args: Any) -> Any:
        if not isinstance(function, partial) or not function.args or not isinstance(function.args[0], nn.Module):
            return function(*args)
        with torch.no_grad(), present(function.args[0]):
            out, reasons[function.args[0]] = _try(*layer_call(function, args))
        return out

    set_checkpoint_function(base, try_layer)
    layers = [module for module in inner.modules() if isinstance(module, GradientCheckpointingLayer)]
    try:
        with preserve_modes(layers), preserve_random_state(device):
            for layer in layers:
                layer.training = True  # the layer alone: its dropout modules stay in their mode
            with torch.enable_grad():  # without gradients some versions do not call the function
                inner(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        set_checkpoint_function(base, None)
    return reasons


def _try(call: LayerCall, hidden: Tensor) -> tuple[Any, str | None]:
    """Run a layer on two tokens with a probe: its output, and None or why it cannot be swept."""
    probe = _Probe()
    accepts = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(call.function).parameters.values())
    plain = partial(call.function, call.layer, hidden, *call.args, **call.keywords)
    if not accepts:
        return plain(), f"{type(call.layer).__name__} does not pass keyword arguments on"
    try:
        out = plain(sweep=probe)
    except TypeError as error:
        if "'sweep'" not in str(error):
            raise
        return plain(), f"its attention does not take keyword arguments ({error})"
    if probe.num_calls != 1:
        return out, f"it attends {probe.num_calls} times through the attention interface, not once"
    if not isinstance(out, Tensor) or out.shape[:2] != hidden.shape[:2]:  # a model takes [0] of a tuple, even of one
        return out, "it does not return the hidden states alone"
    return out, None
