"""The private names of transformers that longfit uses, one function each."""

from collections.abc import Callable
from typing import Any

from torch import nn

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
"""Attributes of modules that hold whether, and by which function, their layers are checkpointed."""


def set_checkpoint_function(model: Any, function: Callable[..., Any] | None) -> None:
    """Let every layer of a model be run by a function in training mode: ``function(partial(forward, layer), *args)``.

    This is how the layer sweep gets its layers. The public ``gradient_checkpointing_enable`` takes arguments for
    torch's own function only.

    Args:
        model: a ``PreTrainedModel`` that supports gradient checkpointing.
        function: None runs layers as they are.
    """
    if function is None:
        model._set_gradient_checkpointing(enable=False)
    else:
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)


def checkpoint_function(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that runs a module's layers in training mode; None where they run as they are."""
    names: dict[str, Any] = vars(module)
    return names.get("_gradient_checkpointing_func") if names.get("gradient_checkpointing") else None


def attention_of(model: Any) -> str:
    """Return the name of the attention that a model's text layers use."""
    return str(model.config.get_text_config()._attn_implementation)


def supports_sdpa(model: Any) -> bool:
    """Whether a family says that its layers run with torch's scaled_dot_product_attention."""
    return bool(model._supports_sdpa)


def forget_kernels(config: Any) -> None:
    """Let a configuration from a file choose neither attention nor experts: a name there may be code on the hub."""
    config._attn_implementation = None
    config._experts_implementation = None


def do_not_initialize(module: Any) -> None:
    """Tell transformers' loader that a module or parameter is filled by us, and must not be drawn at random."""
    module._is_hf_initialized = True


def tied_weights(model: Any) -> dict[str, str]:
    """Return names of tied parameters: that which is not stored -> that which stands for it."""
    names: dict[str, str] = model.all_tied_weights_keys
    return names


def weight_conversions(model: Any) -> list[Any]:
    """What transformers did to a checkpoint's tensors on their way into a model; saving turns it around."""
    found: list[Any] | None = model._weight_conversions
    return found or []


def set_weight_conversions(model: Any, conversions: list[Any]) -> None:
    """Let saving turn only these conversions around."""
    model._weight_conversions = conversions
