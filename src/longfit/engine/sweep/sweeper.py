"""The state of one model's sweep, and the function that stands in for torch's checkpoint in its layers."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longfit.compat.transformers import checkpoint_function
from longfit.engine.hf_model import base_model
from longfit.engine.host_memory import give_back
from longfit.engine.offload.activations import ActivationOffload
from longfit.engine.offload.weights import WeightStream
from longfit.engine.sweep.fused_modules import Fused, fused_forwards, fused_rotary
from longfit.engine.sweep.layer import run_layer, run_layer_without_grad
from longfit.engine.sweep.layer_call import LayerCall, layer_call
from longfit.engine.sweep.recurrent_state import Carrying, has_documents
from longfit.engine.sweep.saved_attention import SavedAttentionBudget
from longfit.engine.sweep.saved_products import SavedProductsBudget
from longfit.engine.sweep.shared_sequence import SharedSequence
from longfit.engine.sweep.unread_product import UnreadProducts
from longfit.engine.working_memory import TRIMMED_LAYERS
from longfit.errors import ModelError

PLAIN = "_longfit_plain"
"""Attribute of a transformers model that ``disable_sweep`` sets: its owner wants plain autograd."""


Mode = Literal["sweep", "evaluate", "plain"]


@dataclass(frozen=True)
class SweepReport:
    """What ``enable_sweep`` did.

    Attributes:
        tile: tokens at once for a batch of one.
        attention: the attention implementation of the model.
        offload: where layer inputs wait for backward.
        layers: names of the layers that are swept.
        fallback: (name, reason) of the layers that are checkpointed in the ordinary way.
    """

    tile: int
    attention: str
    offload: str
    layers: tuple[str, ...]
    fallback: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """Say it in one line, and one more for each reason why a layer is not swept."""
        swept = f"sweeping {len(self.layers)} layers, {self.tile:,} tokens at a time, layer inputs {self.offload}"
        return "\n".join([swept, *self.fallback_lines()])

    def fallback_lines(self) -> list[str]:
        """One line for each reason why layers are not swept."""
        lines = []
        for reason in dict.fromkeys(reason for _, reason in self.fallback):
            names = [name for name, why in self.fallback if why == reason]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            verb = "are" if more else "is"
            lines.append(f"{names[0]}{more} {verb} not swept but checkpointed in the ordinary way: {reason}")
        return lines


@dataclass(eq=False)
class Sweeper:
    """Owner of a model's sweep; transformers calls its ``checkpoint_function`` in place of torch's checkpoint."""

    base: nn.Module
    tile: int
    forced: bool
    offload: ActivationOffload
    saved_attention: SavedAttentionBudget
    saved_products: SavedProductsBudget
    unread: UnreadProducts = field(default_factory=UnreadProducts)
    swept: set[nn.Module] = field(default_factory=set)
    carrying: dict[nn.Module, Carrying] = field(default_factory=dict)
    returns_beside: dict[nn.Module, int] = field(default_factory=dict)
    fused: dict[nn.Module, tuple[Fused, ...]] = field(default_factory=dict)
    weights: WeightStream | None = None
    report: SweepReport | None = None
    mode: Mode = "sweep"
    sequence: SharedSequence | None = None
    differentiated: int = 0

    @contextmanager
    def present(self, module: nn.Module, *, backward: bool = False) -> Iterator[None]:
        """Have a module's weights at hand, wherever they wait, and its fused forwards in place."""
        weights = nullcontext() if self.weights is None else self.weights.use(module, backward=backward)
        with weights, fused_forwards(self.fused.get(module, ())), fused_rotary(self.base):
            yield

    def layer_differentiated(self, device: torch.device) -> None:
        """Give the heap's holes back once in a few layers: each leaves some that no later one fits into."""
        self.differentiated += 1
        if self.differentiated % TRIMMED_LAYERS == 0:
            give_back(device)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Run layers as they are, without any checkpointing, while this lasts.

        Raises: ModelError: frozen weights are streamed to a device, which only the sweep does.
        """
        if self.weights is not None and self.weights.device.type != "cpu":
            raise ModelError(
                "engine 'plain': the model's weights are streamed in by the sweep; disable_sweep(model) first"
            )
        with self._in_mode("plain"):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Record nothing for backward while this lasts."""
        with self._in_mode("evaluate"):
            yield

    @contextmanager
    def _in_mode(self, mode: Mode) -> Iterator[None]:
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    @property
    def sweeps_now(self) -> bool:
        """Whether a call of the model now sweeps its layers: they call for it in training mode, with gradients on."""
        trains = self.mode == "sweep" and torch.is_grad_enabled()
        return (trains or self.mode == "evaluate") and all(layer.training for layer in self.swept)

    def tile_for(self, hidden: Tensor) -> int:
        """Tokens per row and tile: the user's, or the chosen number shared by the rows of the batch."""
        return self.tile if self.forced else max(1, min(self.tile, max(self.tile // hidden.shape[0], 64)))

    def checkpoint_function(self, function: Any, *args: Any) -> Any:
        """Run a layer: swept if it can be, else with torch's checkpoint."""
        if self.mode == "plain":
            return function(*args)
        if not isinstance(function, partial) or not function.args or function.args[0] not in self.swept:
            return checkpoint(function, *args, use_reentrant=False)
        call, hidden = layer_call(function, args)
        call = replace(call, carrying=self.carrying.get(call.layer))
        reason = _why_not_tiled(call)
        if reason is not None:
            if call.carrying is not None and has_documents(call.position_ids, *hidden.shape[:2]):
                raise ModelError(f"{type(call.layer).__name__} {reason}: packed documents would see each other")
            warnings.warn(f"{type(call.layer).__name__} {reason}; it is checkpointed in the ordinary way", stacklevel=2)
            return checkpoint(function, *args, use_reentrant=False)
        trains = hidden.requires_grad or any(p.requires_grad for p in call.layer.parameters())
        run = run_layer if torch.is_grad_enabled() and self.mode != "evaluate" and trains else run_layer_without_grad
        beside = self.returns_beside.get(call.layer)
        out = run(hidden, call, self)
        return out if beside is None else (out, *[None] * beside)


def _why_not_tiled(call: LayerCall) -> str | None:
    """What keeps a layer that is swept otherwise from being swept in this call."""
    if call.carries_gradient:
        return "is given a tensor besides the hidden states that needs a gradient, which the sweep does not follow"
    if call.carrying is not None and call.tells_borders:
        return "is told the borders of documents by their lengths, and carries a state; give position_ids alone"
    return None


def sweeper_of(model: nn.Module) -> Sweeper | None:
    """The sweep that is installed in a model, or None."""
    for module in base_model(model).modules():
        function = checkpoint_function(module)
        if inspect.ismethod(function) and isinstance(function.__self__, Sweeper):
            return function.__self__
    return None
