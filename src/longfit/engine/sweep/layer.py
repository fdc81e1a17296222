"""A decoder layer as one autograd function, computed tile by tile along the sequence.

Ordinary checkpointing recomputes a layer and differentiates it over the whole sequence at once: every activation of the
layer exists for every token. But only attention mixes tokens, and causally. So here

    forward     tiles first to last; K, V live as long as the layer's pass; the layer's input is offloaded
    backward    K, V again, up to where they exist; then tiles last to first, each a small local graph through the
                layer's own modules; dK, dV of a tile are complete when its turn comes; dx is written over dy

A token costs its input, its gradient, K, V and their float32 gradient: 3.5 hidden states for Llama-3.1-8B instead of
more than 25. The result is exact; only the order of additions differs. No layer runs more often than under ordinary
checkpointing; keys and values are projected once more.

Gradients of parameters are collected per tile, summed in float32 and *returned* by the function. So .grad is written
once, hooks fire once, and DDP and gradient accumulation see what they see in any other model.

Not here: layers that carry a state from token to token other than attention (Mamba, convolutions).
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longfit.engine import host_memory
from longfit.engine.offload.activations import ActivationOffload, SavedInput
from longfit.engine.sweep.grad_donation import Receiver, donate, is_donated, receiver_of
from longfit.engine.sweep.grad_sums import GradSums
from longfit.engine.sweep.layer_call import LayerCall
from longfit.engine.sweep.recompute_state import Autocast, RandomState, preserve_random_state
from longfit.engine.sweep.saved_attention import SavedAttention, SavedAttentionBudget
from longfit.engine.sweep.tile_pass import TileLeft, TilePass, Visible
from longfit.kernels.workspace import weights_held


class Sweep(Protocol):
    """What a layer asks of the sweep of its model (``install.py:Sweeper``)."""

    offload: ActivationOffload
    saved_attention: SavedAttentionBudget

    def tile_for(self, hidden: Tensor) -> int:
        """Tokens per tile and row for hidden states ``[B, T, D]``."""
        ...

    def present(self, module: nn.Module, *, backward: bool = False) -> AbstractContextManager[None]:
        """Have a module's weights at hand and its fused forwards in place."""
        ...

    def layer_differentiated(self, device: torch.device) -> None:
        """A layer's backward is over."""
        ...


def run_layer(hidden: Tensor, call: LayerCall, sweep: Sweep) -> Tensor:
    """Run a layer tile by tile and record it for backward: ``[B, T, D]`` -> ``[B, T, D]``."""
    parameters = [p for p in call.layer.parameters() if p.requires_grad]
    out: Tensor = _SweptLayer.apply(hidden, call, sweep, *parameters)
    return out


def run_layer_without_grad(hidden: Tensor, call: LayerCall, sweep: Sweep) -> Tensor:
    """Run a layer tile by tile and keep nothing for a backward."""
    with torch.no_grad(), sweep.present(call.layer), weights_held(hidden.device):
        return _forward(hidden, call, sweep.tile_for(hidden), None, None, may_overwrite=False)[0]


class _SweptLayer(Receiver, torch.autograd.Function):
    """See the module. The parameters are inputs, so that autograd records the layer and receives their gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, call: LayerCall, sweep: Sweep, *parameters: Tensor) -> Tensor:
        ctx.receiver = receiver_of(hidden)
        ctx.save_for_backward(*parameters)
        ctx.autocast = Autocast.now(hidden.device)
        ctx.call, ctx.tile, ctx.sweep = call, sweep.tile_for(hidden), sweep
        num_tiles = -(-hidden.shape[1] // ctx.tile)
        ctx.saved_input, ctx.saved_attention = sweep.offload.open(num_tiles), sweep.saved_attention.open(num_tiles)
        may_overwrite = ctx.receiver is not None and not sweep.offload.aliases and not _is_watched(call.layer)
        with sweep.present(call.layer), weights_held(hidden.device):
            out, ctx.visible, ctx.random = _forward(
                hidden, call, ctx.tile, ctx.saved_input, ctx.saved_attention, may_overwrite=may_overwrite
            )
        if out is hidden:
            ctx.mark_dirty(hidden)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.saved_input is None:
            raise RuntimeError(
                "backward ran twice through a swept layer, whose saved input is given back after the first; compute the"
                " loss again, or call disable_sweep(model)"
            )
        saved_input, ctx.saved_input = ctx.saved_input, None
        parameters, needs_hidden = ctx.saved_tensors, ctx.needs_input_grad[0]
        wanted = [p for p, needed in zip(parameters, ctx.needs_input_grad[3:], strict=True) if needed]
        sums = GradSums(wanted)
        grad_hidden = None
        present = ctx.sweep.present(ctx.call.layer, backward=True)
        with present, weights_held(grad_out.device), preserve_random_state(grad_out.device), ctx.autocast.again():
            tile_pass = TilePass(
                grad_out.shape[1], ctx.tile, ctx.call.keywords, saved=ctx.saved_attention, visible=ctx.visible
            )
            for index in reversed(range(len(ctx.random))):
                for earlier in tile_pass.turn_to_gradients(index):
                    saved_input.prefetch(earlier + 1)
                    _store_keys(saved_input, earlier, tile_pass, ctx.call, ctx.random)
                saved_input.prefetch(max(index - 1, 0))
                hidden = _restore(saved_input, index, "gradients", tile_pass, ctx.random).requires_grad_(needs_hidden)
                start, end = tile_pass.span
                with torch.enable_grad():
                    out = ctx.call.tile(hidden, tile_pass)
                grad_tile = grad_out[:, start:end]
                inputs = [hidden, *wanted] if needs_hidden else wanted
                grads = torch.autograd.grad(out, inputs, grad_tile, allow_unused=True)
                del out
                if needs_hidden:
                    if grad_hidden is None:
                        grad_hidden = _over(grad_out, hidden, is_donated(ctx, grad_out))
                    grad_hidden[:, start:end] = grads[0]
                    grads = grads[1:]
                sums.add(grads)
        saved_input.close()
        if grad_hidden is not None:
            donate(ctx.receiver, grad_hidden)
        totals = iter(sums.totals())
        ctx.sweep.layer_differentiated(grad_out.device)
        return grad_hidden, None, None, *(next(totals) if needed else None for needed in ctx.needs_input_grad[3:])


def _forward(
    hidden: Tensor,
    call: LayerCall,
    tile: int,
    saved_input: SavedInput | None,
    saved_attention: SavedAttention | None,
    *,
    may_overwrite: bool,
) -> tuple[Tensor, Visible, list[RandomState | None]]:
    """All tiles first to last; without the two ``saved_*`` for no backward. May write the output over ``hidden``."""
    tile_pass = TilePass(hidden.shape[1], tile, call.keywords, saved=saved_attention)
    random: list[RandomState | None] = []
    result: Tensor | None = None
    for index in range(-(-hidden.shape[1] // tile)):
        tile_pass.begin("forward", index)
        start, end = tile_pass.span
        part = hidden[:, start:end]
        before = RandomState.now(hidden.device)
        if saved_input is not None:
            saved_input.put(index, part)
        out = call.tile(part, tile_pass)
        random.append(None if before.same(RandomState.now(hidden.device)) else before)
        if result is None:
            fits = may_overwrite and out.dtype == hidden.dtype and out.shape == part.shape and hidden.is_contiguous()
            result = hidden if fits else host_memory.empty(out, (*hidden.shape[:2], *out.shape[2:]))
        if saved_input is not None:
            saved_input.settle(index)
        result[:, start:end] = out
    assert result is not None and tile_pass.visible is not None  # noqa: PT018
    return result, tile_pass.visible, random


def _restore(
    saved_input: SavedInput, index: int, mode: str, tile_pass: TilePass, random: list[RandomState | None]
) -> Tensor:
    """A tile's input again, with the pass and the random state turned to it."""
    tile_pass.begin(mode, index)
    hidden = saved_input.get(index).detach()
    state = random[index]
    if state is not None:
        state.restore(hidden.device)
    return hidden


def _store_keys(
    saved_input: SavedInput, index: int, tile_pass: TilePass, call: LayerCall, random: list[RandomState | None]
) -> None:
    hidden = _restore(saved_input, index, "keys", tile_pass, random)
    with torch.no_grad():
        try:
            call.tile(hidden, tile_pass)
        except TileLeft:
            return
    raise AssertionError("a layer went on after its keys and values were stored")


def _over(grad_out: Tensor, hidden: Tensor, donated: bool) -> Tensor:
    """Where dx goes: over dy if that was donated and dx looks the same."""
    if donated and grad_out.dtype == hidden.dtype and grad_out.shape[2:] == hidden.shape[2:]:
        return grad_out
    return host_memory.empty(hidden, (*grad_out.shape[:2], *hidden.shape[2:]))


def _is_watched(layer: nn.Module) -> bool:
    """Whether a hook may hold on to the layer's input or output (transformers collects hidden states that way)."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
