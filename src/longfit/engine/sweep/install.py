"""Sweep the layers of a model, from ``enable_sweep`` to ``disable_sweep``.

The layers are entered through two public extension points of transformers: the gradient-checkpointing function, which
is called with every layer and its inputs, and the registered attention function, to which the keyword ``sweep=``
travels. A layer that does not use both is named and checkpointed in the ordinary way.
"""

import os
import warnings
from typing import Any

import torch
from torch import nn

from longfit.compat.transformers import attention_of, set_checkpoint_function
from longfit.engine.hf_model import base_model, decoder
from longfit.engine.model_state import ModelState
from longfit.engine.offload.activations import ActivationOffload
from longfit.engine.offload.place import open_offload
from longfit.engine.offload.weights import StreamReport, WeightStream
from longfit.engine.sweep.attention_choice import take_exact_attention
from longfit.engine.sweep.fused_modules import find_fused
from longfit.engine.sweep.saved_attention import SavedAttentionBudget
from longfit.engine.sweep.saved_products import SavedProductsBudget
from longfit.engine.sweep.sweeper import PLAIN, Sweeper, SweepReport, sweeper_of
from longfit.engine.working_memory import CPU_SAVED_ATTENTION_BYTES, tile_tokens
from longfit.errors import ConfigError, ModelError
from longfit.notice import notify


def _check_sizes(tile: int | None, **saved: int | None) -> None:
    if tile is not None and tile < 1:
        raise ValueError(f"tile {tile}: must be at least 1 token; leave it out to let the engine choose")
    for name, value in saved.items():
        if value is not None and value < 0:
            raise ValueError(f"{name} {value}: must be at least 0, which keeps nothing")


def choose_tile(config: Any, element_bytes: int, device_type: str) -> int:
    """Tokens per tile for a model: ``working_memory.tile_tokens`` of its config."""
    inner = config.to_dict().get("intermediate_size") or 4 * config.hidden_size
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner
    return tile_tokens(config.hidden_size, inner, element_bytes, device_type)


def enable_sweep(
    model: nn.Module,
    *,
    tile: int | None = None,
    offload: str | ActivationOffload | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    saved_attention_bytes: int | None = None,
    saved_products_bytes: int | None = None,
) -> SweepReport:
    """Sweep the layers of a model from now on, in training mode; a few tokens are run to see which can be.

    ``training_loss`` does this by itself; call it to choose otherwise. The model's attention becomes longfit's exact
    attention unless it is longfit's already. Streamed weights go on being streamed. If it fails, the model is as
    before.

    Args:
        model: a transformers causal language model, or a PeftModel around one.
        tile: tokens at once in each row; default: :func:`choose_tile`.
        offload: where layer inputs wait for backward: ``"device"`` (the default), ``"ram"``, ``"pinned"`` or
            ``"file"``, as in :func:`open_offload`, or an ``ActivationOffload``.
        offload_folder: of the file, on a real disk; default: the system's folder for temporary files.
        saved_attention_bytes: what attention outputs may take that are saved for backward instead of computed again;
            default: 512 MiB on a CPU, nothing on an accelerator.
        saved_products_bytes: what results of linear layers may take that are saved in the same way; default: nothing.
    Returns: what is swept and what is not, and why; layers that are not are also warned about.
    Raises: ValueError: ``tile`` is below 1, or ``saved_*_bytes`` below 0. ConfigError: the place to offload to does
        not exist here. ModelError: no causal language model, or one whose attention is not understood.
    """
    _check_sizes(tile, saved_attention_bytes=saved_attention_bytes, saved_products_bytes=saved_products_bytes)
    base, inner, before = base_model(model), decoder(model), sweeper_of(model)
    config = base.config.get_text_config()
    device = _device(base, before)
    place = open_offload(offload, device, folder=offload_folder)
    chosen = tile or choose_tile(config, max(2, inner.get_input_embeddings().weight.element_size()), device.type)
    if saved_attention_bytes is None:
        saved_attention_bytes = CPU_SAVED_ATTENTION_BYTES if device.type == "cpu" else 0
    attention, products = SavedAttentionBudget(saved_attention_bytes), SavedProductsBudget(saved_products_bytes or 0)
    sweeper = Sweeper(base, chosen, tile is not None, place, attention, products)
    sweeper.weights = None if before is None else before.weights
    state = ModelState(model)
    try:
        nature = take_exact_attention(model, present=sweeper.present, device=device, again=True)
        if nature.causal is not None:
            raise ModelError(f"{nature.causal}: longfit trains models in which a token sees only what comes before it")
        reasons = {layer: found.sweeps for layer, found in nature.layers.items()}
        sweeper.swept.update(layer for layer, reason in reasons.items() if reason is None)
        for layer, found in nature.layers.items():
            if found.carrying is not None:
                sweeper.carrying[layer] = found.carrying
            if found.returns_beside is not None:
                sweeper.returns_beside[layer] = found.returns_beside
        sweeper.fused = {layer: find_fused(layer) for layer in sweeper.swept}
    except BaseException:
        state.restore()
        raise
    sweeper.report = _report(base, sweeper, reasons)
    for line in sweeper.report.fallback_lines():
        warnings.warn(line, stacklevel=2)
    if base.supports_gradient_checkpointing:
        set_checkpoint_function(base, sweeper.checkpoint_function)
    vars(base).pop(PLAIN, None)
    return sweeper.report


def _report(base: Any, sweeper: Sweeper, reasons: dict[nn.Module, str | None]) -> SweepReport:
    names = {module: name for name, module in base.named_modules()}
    fallback = tuple((names[layer], reason) for layer, reason in reasons.items() if reason is not None)
    if not reasons:
        fallback = ((type(base).__name__, "its layers do not call the gradient-checkpointing function"),)
    layers = tuple(names[layer] for layer, reason in reasons.items() if reason is None)
    attention = attention_of(base)
    return SweepReport(sweeper.tile, attention, sweeper.offload.place, layers, fallback)


def sweep_by_default(model: nn.Module) -> Sweeper | None:
    """Sweep a model unless its owner has chosen: swept already, or plain by ``disable_sweep``; say so once.

    Returns: the sweep, or None where the owner wants plain autograd.
    Raises: ModelError: a layer asks for what longfit's attention does not do; with the way out.
    """
    sweeper = sweeper_of(model)
    if sweeper is not None or PLAIN in vars(base_model(model)):
        return sweeper
    try:
        report = enable_sweep(model)
    except ModelError as error:
        raise ModelError(f"{error}; or train it plainly: training_loss(..., engine='plain')") from error
    swept = str(report).splitlines()[0]
    notify(f"{swept}; enable_sweep(model, ...) chooses otherwise, engine='plain' is ordinary autograd")
    return sweeper_of(model)


def change_sweep(
    model: nn.Module,
    *,
    tile: int | None = None,
    offload: str | ActivationOffload | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    saved_attention_bytes: int | None = None,
    saved_products_bytes: int | None = None,
) -> None:
    """Sweep in another way from the next forward pass on; what is None stays, as do streamed weights.

    Args:
        model: one that is swept.
        tile, offload, offload_folder, saved_attention_bytes, saved_products_bytes: as for :func:`enable_sweep`.
    Raises: ValueError, ConfigError: as :func:`enable_sweep`, or the model is not swept.
    """
    _check_sizes(tile, saved_attention_bytes=saved_attention_bytes, saved_products_bytes=saved_products_bytes)
    sweeper = sweeper_of(model)
    if sweeper is None:
        raise ValueError("change_sweep: the model is not swept; call enable_sweep first")
    if tile is not None:
        sweeper.tile, sweeper.forced = tile, True
    if offload is not None:
        sweeper.offload = open_offload(offload, _device(base_model(model), sweeper), folder=offload_folder)
    if saved_attention_bytes is not None:
        sweeper.saved_attention = SavedAttentionBudget(saved_attention_bytes)
    if saved_products_bytes is not None:
        sweeper.saved_products = SavedProductsBudget(saved_products_bytes)


def disable_sweep(model: nn.Module) -> None:
    """Let the layers of a model run as they are, without any checkpointing; its attention stays longfit's.

    ``training_loss`` is plain autograd from now on, until ``enable_sweep``. Streamed weights go back to the model's
    device.
    """
    base, sweeper = base_model(model), sweeper_of(model)
    if sweeper is not None and sweeper.weights is not None:
        sweeper.weights.close()
    if base.supports_gradient_checkpointing:
        set_checkpoint_function(base, None)
    vars(base)[PLAIN] = True


def stream_weights(model: nn.Module, *, folder: str | os.PathLike[str] | None = None) -> StreamReport:
    """Move the frozen weights of a swept model out, and bring each layer's in when its turn comes.

    Call it when adapters are in place and ``enable_sweep`` has been called; it lasts until :func:`disable_sweep`.
    Called again, it moves the weights to the new place.

    Args:
        model: swept, a transformers causal language model or a PeftModel around one.
        folder: where the file goes; None is host memory, which only makes sense for an accelerator.
    Returns: what was moved.
    Raises: ConfigError: the model is not swept, or it is on the CPU and no folder is named.
    """
    base, sweeper = base_model(model), sweeper_of(model)
    if sweeper is None or not sweeper.swept:
        raise ConfigError("stream_weights: the model is not swept, so nobody brings its layers in; enable_sweep first")
    device = _device(base, sweeper)
    if device.type == "cpu" and folder is None:
        raise ConfigError("stream_weights: the weights are in host memory already; name a folder to keep them on disk")
    if sweeper.weights is not None:
        sweeper.weights.leave_waiting()
    sweeper.weights = WeightStream(
        base, sweeper.swept, folder=folder, slots_on=device if device.type != "cpu" else None
    )
    return sweeper.weights.report


def _device(base: Any, sweeper: Sweeper | None) -> torch.device:
    """Where the model computes; streamed weights wait elsewhere."""
    if sweeper is not None and sweeper.weights is not None:
        return sweeper.weights.device
    device: torch.device = base.get_input_embeddings().weight.device
    return device
