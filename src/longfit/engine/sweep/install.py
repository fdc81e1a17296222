"""A decoder layer as one autograd function, swept over the sequence tile by tile.

Ordinary checkpointing recomputes a layer and differentiates it over the whole sequence at once: every activation of the
layer exists for every token. But only attention mixes tokens, and causally. So here

    forward     tiles first to last; K, V live as long as the layer's pass; the layer's input goes to the arena
    backward    K, V again, up to where they exist; then tiles last to first, each a small local graph through the
                layer's own modules; dK, dV of a tile are complete when its turn comes; dx is written over dy

A token costs its input, its gradient, K, V and their float32 gradient: 3.5 hidden states for Llama-3.1-8B instead of
more than 25. The result is exact; only the order of additions differs. No layer runs more often than under ordinary
checkpointing; keys and values are projected once more.

The layer is entered through two public doors of transformers, and no model is patched: the gradient-checkpointing
function, which is called with every layer and its inputs, and the registered attention function, to which the keyword
``sweep=`` travels. A layer that does not use both is named and checkpointed in the ordinary way.

Gradients of parameters are collected per tile, summed in float32 and *returned* by the function. So .grad is written
once, hooks fire once, and DDP and gradient accumulation see what they see in any other model.

Not here: layers that carry a state from token to token other than attention (Mamba, convolutions).
"""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from longfit.attention.hf_attention import attention_key
from longfit.engine import host_memory
from longfit.engine.hf_model import base_model, decoder
from longfit.engine.host_memory import give_back
from longfit.engine.offload.activations import Arena, MemoryArena
from longfit.engine.sizes import CPU_KEPT_BYTES, TRIMMED_LAYERS, tile_tokens
from longfit.engine.sweep.fused_modules import Fused, find_fused, fused_forwards
from longfit.engine.sweep.grad_donation import Receiver, is_promised, promise, receiver_of
from longfit.engine.sweep.layer_call import LayerCall, layer_call
from longfit.engine.sweep.probe import probe_layers
from longfit.engine.sweep.recompute_state import Autocast, RandomState, random_state_kept
from longfit.engine.sweep.saved_attention import KeptAttention, KeptBudget
from longfit.engine.sweep.tile_pass import LayerWalk, TileLeft, Visible
from longfit.kernels.workspace import weights_held


# ------------------------------------------------------------------------------------------------ one layer
class _SweepLayer(Receiver, torch.autograd.Function):
    """See the module. The parameters are inputs, so that autograd records the layer and receives their gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, call: LayerCall, plan: "Sweeper", *parameters: Tensor) -> Tensor:
        ctx.receiver = receiver_of(hidden)
        ctx.save_for_backward(*parameters)
        ctx.autocast = Autocast.now(hidden.device)
        ctx.call, ctx.tile, ctx.plan = call, plan.tile_for(hidden), plan
        num_tiles = -(-hidden.shape[1] // ctx.tile)
        ctx.stay, ctx.kept = plan.arena.open(num_tiles), plan.kept.open(num_tiles)
        may_overwrite = ctx.receiver is not None and not plan.arena.aliases and not _is_watched(call.layer)
        with plan.present(call.layer), weights_held(hidden.device):
            out, ctx.visible, ctx.random = _forward(hidden, call, ctx.tile, ctx.stay, ctx.kept, may_overwrite)
        if out is hidden:
            ctx.mark_dirty(hidden)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.stay is None:
            raise RuntimeError(
                "backward ran twice through a swept layer, whose saved input is given back after the first; compute the"
                " loss again, or call disable_sweep(model)"
            )
        stay, ctx.stay = ctx.stay, None
        parameters, needs_hidden = ctx.saved_tensors, ctx.needs_input_grad[0]
        wanted = [p for p, needed in zip(parameters, ctx.needs_input_grad[3:], strict=True) if needed]
        sums = _Sums(wanted)
        grad_hidden = None
        present = ctx.plan.present(ctx.call.layer, backward=True)
        with present, weights_held(grad_out.device), random_state_kept(grad_out.device), ctx.autocast.again():
            walk = LayerWalk(grad_out.shape[1], ctx.tile, ctx.call.keywords, kept=ctx.kept, visible=ctx.visible)
            for index in reversed(range(len(ctx.random))):
                for earlier in walk.turn_to_gradients(index):
                    stay.prefetch(earlier + 1)
                    _store_keys(stay, earlier, walk, ctx.call, ctx.random)
                stay.prefetch(max(index - 1, 0))
                hidden = _recall(stay, index, "gradients", walk, ctx.random).requires_grad_(needs_hidden)
                start, end = walk.span
                with torch.enable_grad():
                    out = ctx.call.tile(hidden, walk)
                grad_tile = grad_out[:, start:end]
                inputs = [hidden, *wanted] if needs_hidden else wanted
                grads = torch.autograd.grad(out, inputs, grad_tile, allow_unused=True)
                del out
                if needs_hidden:
                    if grad_hidden is None:
                        grad_hidden = _over(grad_out, hidden, is_promised(ctx, grad_out))
                    grad_hidden[:, start:end] = grads[0]
                    grads = grads[1:]
                sums.add(grads)
        stay.close()
        if grad_hidden is not None:
            promise(ctx.receiver, grad_hidden)
        totals = iter(sums.totals())
        ctx.plan.layer_differentiated(grad_out.device)
        return grad_hidden, None, None, *(next(totals) if needed else None for needed in ctx.needs_input_grad[3:])


def _forward(
    hidden: Tensor, call: LayerCall, tile: int, stay: Any | None, kept: KeptAttention | None, may_overwrite: bool
) -> tuple[Tensor, Visible, list[RandomState | None]]:
    """All tiles first to last; without ``stay`` and ``kept`` for no backward. May write the output over ``hidden``."""
    walk = LayerWalk(hidden.shape[1], tile, call.keywords, kept=kept)
    random: list[RandomState | None] = []
    result: Tensor | None = None
    for index in range(-(-hidden.shape[1] // tile)):
        walk.begin("forward", index)
        start, end = walk.span
        part = hidden[:, start:end]
        before = RandomState.now(hidden.device)
        if stay is not None:
            stay.put(index, part)
        out = call.tile(part, walk)
        random.append(None if before.same(RandomState.now(hidden.device)) else before)
        if result is None:
            fits = may_overwrite and out.dtype == hidden.dtype and out.shape == part.shape and hidden.is_contiguous()
            result = hidden if fits else host_memory.empty(out, (*hidden.shape[:2], *out.shape[2:]))
        if stay is not None:
            stay.settle(index)
        result[:, start:end] = out
    assert result is not None and walk.visible is not None  # noqa: PT018
    return result, walk.visible, random


def _recall(stay: Any, index: int, mode: str, walk: LayerWalk, random: list[RandomState | None]) -> Tensor:
    """A tile's input again, with the walk and the random state turned to it."""
    walk.begin(mode, index)
    hidden: Tensor = stay.get(index).detach()
    state = random[index]
    if state is not None:
        state.restore(hidden.device)
    return hidden


def _store_keys(stay: Any, index: int, walk: LayerWalk, call: LayerCall, random: list[RandomState | None]) -> None:
    hidden = _recall(stay, index, "keys", walk, random)
    with torch.no_grad():
        try:
            call.tile(hidden, walk)
        except TileLeft:
            return
    raise AssertionError("a layer went on after its keys and values were stored")


def _over(grad_out: Tensor, hidden: Tensor, ours: bool) -> Tensor:
    """Where dx goes: over dy if that is ours and dx looks the same."""
    if ours and grad_out.dtype == hidden.dtype and grad_out.shape[2:] == hidden.shape[2:]:
        return grad_out
    return host_memory.empty(hidden, (*grad_out.shape[:2], *hidden.shape[2:]))


def _is_watched(layer: nn.Module) -> bool:
    """Whether a hook may hold on to the layer's input or output (transformers collects hidden states that way)."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


class _Sums:
    """Parameter gradients of all tiles, added in float32 (float64 for float64); None where none ever came.

    They lie in one piece a layer, as they stay until the optimiser steps: a small block in the heap would spoil the
    place of a large one.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)
        self._dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        self._ends = list(accumulate(p.numel() for p in parameters))
        self._all = host_memory.empty(parameters[0].detach(), (self._ends[-1],), self._dtype) if parameters else None

    def add(self, gradients: tuple[Tensor | None, ...]) -> None:
        for number, gradient in enumerate(gradients):
            total = self._sums[number]
            if gradient is None:
                continue
            if total is not None:
                total += gradient
                continue
            assert self._all is not None, "gradients of nothing"
            end = self._ends[number]
            self._sums[number] = self._all[end - gradient.numel() : end].view(gradient.shape).copy_(gradient)

    def totals(self) -> list[Tensor | None]:
        return [
            None if total is None else total.to(parameter.grad_dtype or parameter.dtype)
            for total, parameter in zip(self._sums, self._parameters, strict=True)
        ]


# ------------------------------------------------------------------------------------------------ all layers of a model
@dataclass(frozen=True)
class SweepReport:
    """What ``enable_sweep`` did.

    Attributes:
        tile: tokens at once for a batch of one.
        attention: the attention implementation of the model.
        layers: names of the layers that are swept.
        fallback: (name, reason) of the layers that are checkpointed in the ordinary way.
    """

    tile: int
    attention: str
    layers: tuple[str, ...]
    fallback: tuple[tuple[str, str], ...]


class Weights(Protocol):
    """Who makes a layer's frozen weights present while it runs (``stream.py``)."""

    def use(self, module: nn.Module, *, backward: bool = False) -> AbstractContextManager[None]:
        """Hold the weights of ``module``; the next to be used is the one before it or behind it."""
        ...


@dataclass(eq=False)
class Sweeper:
    """Owner of a model's sweep: its ``door`` is the function that every checkpointed layer is given to."""

    tile: int
    forced: bool
    arena: Arena
    kept: KeptBudget
    swept: set[nn.Module] = field(default_factory=set)
    fused: dict[nn.Module, tuple[Fused, ...]] = field(default_factory=dict)
    weights: Weights | None = None
    evaluating: bool = False
    differentiated: int = 0

    @contextmanager
    def present(self, module: nn.Module, *, backward: bool = False) -> Iterator[None]:
        """Have a module's weights at hand, wherever they wait, and its fused forwards in place."""
        weights = nullcontext() if self.weights is None else self.weights.use(module, backward=backward)
        with weights, fused_forwards(self.fused.get(module, ())):
            yield

    def layer_differentiated(self, device: torch.device) -> None:
        """Give the heap's holes back once in a few layers: each leaves some that no later one fits into."""
        self.differentiated += 1
        if self.differentiated % TRIMMED_LAYERS == 0:
            give_back(device)

    def tile_for(self, hidden: Tensor) -> int:
        """Tokens per row and tile: the user's, or the chosen number shared by the rows of the batch."""
        return self.tile if self.forced else max(1, min(self.tile, max(self.tile // hidden.shape[0], 64)))

    def door(self, function: Any, *args: Any) -> Any:
        """Run a layer: swept if it can be, else with torch's checkpoint."""
        if not isinstance(function, partial) or not function.args or function.args[0] not in self.swept:
            return checkpoint(function, *args, use_reentrant=False)
        call, hidden = layer_call(function, args)
        if call.carries_gradient:
            warnings.warn(
                f"{type(call.layer).__name__} is given a tensor besides the hidden states that needs a gradient, which"
                " the sweep does not follow; it is checkpointed in the ordinary way",
                stacklevel=2,
            )
            return checkpoint(function, *args, use_reentrant=False)
        parameters = [p for p in call.layer.parameters() if p.requires_grad]
        if torch.is_grad_enabled() and not self.evaluating and (hidden.requires_grad or parameters):
            return _SweepLayer.apply(hidden, call, self, *parameters)
        with torch.no_grad(), self.present(call.layer), weights_held(hidden.device):
            return _forward(hidden, call, self.tile_for(hidden), None, None, False)[0]


def _check_sizes(tile: int | None, kept_bytes: int | None) -> None:
    if tile is not None and tile < 1:
        raise ValueError(f"tile {tile}: must be at least 1 token; leave it out to let the engine choose")
    if kept_bytes is not None and kept_bytes < 0:
        raise ValueError(f"kept_bytes {kept_bytes}: must be at least 0, which keeps nothing")


def choose_tile(config: Any, element_bytes: int, device_type: str) -> int:
    """Tokens per tile for a model: ``sizes.tile_tokens`` of its config."""
    inner = config.to_dict().get("intermediate_size") or 4 * config.hidden_size
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner
    return tile_tokens(config.hidden_size, inner, element_bytes, device_type)


def enable_sweep(
    model: nn.Module, *, tile: int | None = None, arena: Arena | None = None, kept_bytes: int | None = None
) -> SweepReport:
    """Sweep the layers of a model from now on, in training mode; two tokens are run once to see which can be.

    The model's attention becomes longfit's exact attention unless it is longfit's already.

    Args:
        model: a transformers causal language model, or a PeftModel around one.
        tile: tokens at once in each row; default: :func:`choose_tile`.
        arena: where layer inputs wait; default: where they are.
        kept_bytes: what attention outputs may take that are kept from forward to backward, not computed again; default:
            512 MiB on a CPU, nothing on an accelerator.
    Returns: what is swept and what is not, and why; layers that are not are also warned about.
    Raises: ValueError: ``tile`` is below 1, or ``kept_bytes`` below 0. ModelError: no causal language model.
    """
    _check_sizes(tile, kept_bytes)
    base, inner = base_model(model), decoder(model)
    config = base.config.get_text_config()
    if not str(config._attn_implementation).startswith("longfit-"):
        base.set_attn_implementation(attention_key())
    embedding = inner.get_input_embeddings().weight
    chosen = tile or choose_tile(config, max(2, embedding.element_size()), embedding.device.type)
    if kept_bytes is None:
        kept_bytes = CPU_KEPT_BYTES if embedding.device.type == "cpu" else 0
    sweeper = Sweeper(chosen, tile is not None, arena or MemoryArena(), KeptBudget(kept_bytes))
    reasons = probe_layers(base, inner, embedding.device)
    names = {module: name for name, module in base.named_modules()}
    sweeper.swept.update(layer for layer, reason in reasons.items() if reason is None)
    sweeper.fused = {layer: find_fused(layer) for layer in sweeper.swept}
    fallback = tuple((names[layer], reason) for layer, reason in reasons.items() if reason is not None)
    if not sweeper.swept and not fallback:
        fallback = ((type(base).__name__, "its layers do not call the gradient-checkpointing function"),)
    for name, reason in fallback:
        warnings.warn(f"{name} is not swept but checkpointed in the ordinary way: {reason}", stacklevel=2)
    if base.supports_gradient_checkpointing:
        base._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=sweeper.door)
    layers = tuple(names[layer] for layer, reason in reasons.items() if reason is None)
    return SweepReport(chosen, str(config._attn_implementation), layers, fallback)


def change_sweep(
    model: nn.Module, *, tile: int | None = None, arena: Arena | None = None, kept_bytes: int | None = None
) -> None:
    """Sweep in another way from the next forward pass on; what is None stays, as do streamed weights.

    Args:
        model: one that is swept.
        tile, arena, kept_bytes: as for :func:`enable_sweep`.
    Raises: ValueError: as :func:`enable_sweep`, or the model is not swept.
    """
    _check_sizes(tile, kept_bytes)
    sweeper = sweeper_of(model)
    if sweeper is None:
        raise ValueError("change_sweep: the model is not swept; call enable_sweep first")
    if tile is not None:
        sweeper.tile, sweeper.forced = tile, True
    sweeper.arena = arena or sweeper.arena
    if kept_bytes is not None:
        sweeper.kept = KeptBudget(kept_bytes)


def disable_sweep(model: nn.Module) -> None:
    """Let the layers of a model run as they are, without any checkpointing; its attention stays longfit's."""
    base = base_model(model)
    if base.supports_gradient_checkpointing:
        base._set_gradient_checkpointing(enable=False)


@contextmanager
def swept_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluate a swept model tile by tile: no layer holds activations of the whole sequence.

    Layers come to the checkpointing door only in training mode and, in some versions of transformers, with gradients
    on. So the layers themselves, not what is in them, are put into that mode, and gradients are on from the call of a
    layer to its door: dropout stays off, and shifted attention stays exact. Nothing is recorded for backward.
    """
    sweeper = sweeper_of(model)
    layers = [] if sweeper is None else list(sweeper.swept)
    modes = [(module, module.training) for module in model.modules()]
    hooks: list[RemovableHandle] = []
    try:
        model.eval()
        if sweeper is not None:
            sweeper.evaluating = True
        for layer in layers:
            layer.training = True
            hooks.append(layer.register_forward_pre_hook(lambda *_: _gradients(True)))
            hooks.append(layer.register_forward_hook(lambda *_: _gradients(False), always_call=True))
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        if sweeper is not None:
            sweeper.evaluating = False
        for module, mode in modes:
            module.training = mode


def _gradients(on: bool) -> None:
    """Turn gradients on or off; as a hook it returns nothing that would replace what passes it."""
    torch.set_grad_enabled(on)


def sweeper_of(model: nn.Module) -> Sweeper | None:
    """The sweep that is installed in a model, or None."""
    for module in base_model(model).modules():
        function = vars(module).get("_gradient_checkpointing_func")
        if inspect.ismethod(function) and isinstance(function.__self__, Sweeper) and module.gradient_checkpointing:
            return function.__self__
    return None
