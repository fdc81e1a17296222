"""A decoder layer as one autograd function, computed tile by tile along the sequence.

Ordinary checkpointing recomputes a layer and differentiates it over the whole sequence at once: every activation of the
layer exists for every token. But only attention mixes tokens, and causally. So here

    forward     tiles first to last; K, V live as long as the layer's pass; the layer's input is offloaded
    backward    K, V again, up to where they exist; then tiles last to first, each a small local graph through the
                layer's own modules; dK, dV of a tile are complete when its turn comes; dx is written over dy

A token costs a gradient, K, V and their float32 gradient: 2.6 hidden states for Llama-3.1-8B instead of more than 25,
beside the layer's input, which waits where it is offloaded to. The result is exact; only the order of additions
differs. No layer runs more often than under ordinary checkpointing; keys and values are projected once more.

Gradients of parameters are collected per tile, summed in float32 and *returned* by the function. So .grad is written
once, hooks fire once, and DDP and gradient accumulation see what they see in any other model.

A layer that carries a state besides (Mamba, gated delta nets, convolutions) takes it up at each tile and hands it on
(``recurrent_state.py``).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longfit.compat.torch import forward_is_hooked
from longfit.engine import host_memory
from longfit.engine.offload.activations import ActivationOffload, SavedInput
from longfit.engine.sweep.grad_donation import Receiver, donate, is_donated, receiver_of
from longfit.engine.sweep.grad_sums import GradSums
from longfit.engine.sweep.layer_call import LayerCall
from longfit.engine.sweep.recompute_state import Autocast, RandomState, preserve_random_state
from longfit.engine.sweep.recurrent_state import CarriedStates, TileState, changed_in_place, document_stretches
from longfit.engine.sweep.saved_attention import SavedAttention, SavedAttentionBudget
from longfit.engine.sweep.saved_products import SavedProducts, SavedProductsBudget
from longfit.engine.sweep.shared_sequence import (
    KeysProjected,
    KeyTransport,
    SharedSequence,
    Stretch,
    late_tiles,
    num_tiles,
    project_sent,
    whole,
)
from longfit.engine.sweep.tile_pass import BackwardPass, ForwardPass, ProjectionTile
from longfit.engine.sweep.unread_product import UnreadProducts
from longfit.engine.sweep.visible_keys import VisibleKeys
from longfit.kernels.workspace import weights_held


class Sweep(Protocol):
    """What a layer asks of the sweep of its model (``install.py:Sweeper``)."""

    offload: ActivationOffload
    saved_attention: SavedAttentionBudget
    saved_products: SavedProductsBudget
    unread: UnreadProducts
    sequence: SharedSequence | None

    def tile_for(self, hidden: Tensor) -> int:
        """Tokens per tile and row for hidden states ``[B, T, D]``."""
        ...

    def present(self, module: nn.Module, *, backward: bool = False) -> AbstractContextManager[None]:
        """Have a module's weights at hand and its fused forwards in place."""
        ...

    def layer_differentiated(self, device: torch.device) -> None:
        """A layer's backward is over."""
        ...


def run_layer(hidden: Tensor, call: LayerCall, sweep: Sweep, *, parameters: Sequence[Tensor] | None = None) -> Tensor:
    """Run a layer tile by tile and record it for backward: ``[B, T, D]`` -> ``[B, T, D]``.

    Args:
        hidden, call, sweep: the layer's input, its call and the sweep it is run by.
        parameters: those that get gradients; by default all of the layer that train.
    """
    if parameters is None:
        parameters = [p for p in call.layer.parameters() if p.requires_grad]
    out: Tensor = _SweptLayer.apply(hidden, call, sweep, *parameters)
    return out


def run_layer_without_grad(hidden: Tensor, call: LayerCall, sweep: Sweep) -> Tensor:
    """Run a layer tile by tile and keep nothing for a backward."""
    work = _Work.of(hidden, call, sweep)
    with torch.no_grad(), sweep.present(call.layer), weights_held(hidden.device):
        return _forward(hidden, work, None, work.open_states(None), may_overwrite=False)[0]


@dataclass(frozen=True)
class _Work:
    """A layer's call and the tokens that this process has to take it over."""

    call: LayerCall
    tile: int
    stretches: tuple[Stretch, ...]
    sequence: SharedSequence | None
    continuing: dict[int, Tensor | None] = field(default_factory=lambda: {0: None})

    @classmethod
    def of(cls, hidden: Tensor, call: LayerCall, sweep: Sweep) -> "_Work":
        tile, sequence = sweep.tile_for(hidden), sweep.sequence
        if not call.attends:
            assert sequence is None, "nobody carries a state from process to process"
            stretches, continuing = document_stretches(call.position_ids, hidden.shape[0], hidden.shape[1], tile)
            return cls(call, tile, stretches, None, continuing)
        stretches = whole(hidden.shape[1]) if sequence is None else sequence.stretches(tile)
        return cls(call, tile, stretches, sequence)

    @property
    def num_tiles(self) -> int:
        """Tiles of all stretches."""
        return sum(num_tiles(stretch, self.tile) for stretch in self.stretches)

    def open_states(self, offload: ActivationOffload | None) -> CarriedStates | None:
        """Begin with the states that the layer carries, saved for a backward if there is a place; None for no state."""
        if self.call.carrying is None:
            return None
        return CarriedStates(None if offload is None else offload.open_states(self.num_tiles), self.continuing)

    def forward_passes(self, saved: SavedAttention | None) -> list[ForwardPass]:
        """Begin a pass over each stretch."""
        positions = self.call.position_ids
        return [ForwardPass(stretch, self.tile, positions, saved=saved) for stretch in self.stretches]

    def backward_passes(self, saved: SavedAttention | None, visible: Sequence[VisibleKeys]) -> list[BackwardPass]:
        """Begin a pass over each stretch, with what its forward pass found."""
        positions = self.call.position_ids
        return [
            BackwardPass(stretch, self.tile, seen, positions, saved=saved)
            for stretch, seen in zip(self.stretches, visible, strict=True)
        ]


class _SweptLayer(Receiver, torch.autograd.Function):
    """See the module. The parameters are inputs, so that autograd records the layer and receives their gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, call: LayerCall, sweep: Sweep, *parameters: Tensor) -> Tensor:
        ctx.receiver = receiver_of(hidden)
        ctx.save_for_backward(*parameters)
        ctx.autocast = Autocast.now(hidden.device)
        ctx.work, ctx.sweep = _Work.of(hidden, call, sweep), sweep
        tiles = ctx.work.num_tiles
        ctx.saved_input = sweep.offload.open(tiles)
        ctx.states = ctx.work.open_states(sweep.offload)
        ctx.saved_attention, ctx.saved_products = sweep.saved_attention.open(tiles), sweep.saved_products.open()
        saved = _Saved(ctx.saved_input, ctx.saved_attention, ctx.saved_products, sweep.unread.of(call.layer))
        may_overwrite = ctx.receiver is not None and not sweep.offload.aliases and not _is_watched(call.layer)
        with sweep.present(call.layer), weights_held(hidden.device):
            out, ctx.visible, ctx.random = _forward(hidden, ctx.work, saved, ctx.states, may_overwrite=may_overwrite)
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
        wanted = [p for p, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True) if needed]
        backward = _Backward(ctx, grad_out, wanted, saved_input)
        present = ctx.sweep.present(ctx.work.call.layer, backward=True)
        with present, weights_held(grad_out.device), preserve_random_state(grad_out.device), ctx.autocast.again():
            backward.run()
        saved_input.close()
        if ctx.states is not None:
            ctx.states.close()
        if backward.grad_hidden is not None:
            donate(ctx.receiver, backward.grad_hidden)
        totals = iter(backward.sums.totals())
        ctx.sweep.layer_differentiated(grad_out.device)
        parameters = (next(totals) if needed else None for needed in ctx.needs_input_grad[3:])
        return backward.grad_hidden, None, None, *parameters


@dataclass(frozen=True)
class _Saved:
    """Where a layer's forward pass leaves what its backward takes up again."""

    input: SavedInput
    attention: SavedAttention
    products: SavedProducts
    unread: nn.Module | None  # a linear layer whose product is not wanted


class _Backward:
    """The backward of one layer: tiles last to first, each a small graph; then what other processes have sent."""

    def __init__(self, ctx: Any, grad_out: Tensor, wanted: list[Tensor], saved_input: SavedInput) -> None:
        self.grad_hidden: Tensor | None = None
        self.sums = GradSums(wanted)
        self._grad_out, self._wanted, self._saved_input = grad_out, wanted, saved_input
        self._work: _Work = ctx.work
        self._random: list[RandomState | None] = ctx.random
        self._needs_hidden: bool = ctx.needs_input_grad[0]
        self._donated = is_donated(ctx, grad_out)
        self._unread: UnreadProducts = ctx.sweep.unread
        self._products: SavedProducts = ctx.saved_products
        self._states: CarriedStates | None = ctx.states
        self._passes = self._work.backward_passes(ctx.saved_attention, ctx.visible)

    def run(self) -> None:
        transport = None
        if self._work.sequence is not None:
            transport = _exchange_halos(self._work, self._passes, self._project_without_grad)
        gradients = []
        for tiles in reversed(self._passes):
            for index in reversed(range(tiles.num_tiles)):
                self._differentiate(tiles, index)
            if transport is not None:
                gradients.append(tiles.halo_gradients())
        if transport is not None:
            self._receive(transport, gradients[::-1])

    def _differentiate(self, tiles: BackwardPass, index: int) -> None:
        for earlier in tiles.needed(index):
            self._saved_input.prefetch(tiles.number(earlier + 1))
            hidden = self._restore(tiles.number(earlier))
            with torch.no_grad():
                _project_keys(self._work.call, hidden, tiles.keys_tile(earlier), self._state(tiles, earlier))
        self._saved_input.prefetch(max(tiles.number(index - 1), 0))
        hidden = self._restore(tiles.number(index)).requires_grad_(self._needs_hidden)
        tile, state = tiles.gradient_tile(index), self._state(tiles, index)
        start, end = tile.span
        layer, number = self._work.call.layer, tiles.number(index)
        with changed_in_place(state, end - start):
            with torch.enable_grad(), self._unread.left_out(layer) as run, self._products.known(layer, number):
                out = self._work.call.run(hidden, tile, state)
                run.check(out)
            grads = self._gradients(out, self._grad_out[:, start:end], hidden, number, state)
        del out
        if self._needs_hidden:
            if self.grad_hidden is None:
                self.grad_hidden = _gradient_memory(self._grad_out, hidden, self._donated)
            assert grads[0] is not None, "a layer's output depends on its input"
            self.grad_hidden[:, start:end] = grads[0]
            grads = grads[1:]
        self.sums.add(grads)

    def _gradients(
        self, out: Tensor, grad_out: Tensor, hidden: Tensor, number: int, state: TileState | None
    ) -> tuple[Tensor | None, ...]:
        """Differentiate a tile by its hidden states, if wanted, and the parameters; a state keeps its own gradient."""
        inputs = [hidden, *self._wanted] if self._needs_hidden else self._wanted
        if self._states is None or state is None:
            return torch.autograd.grad(out, inputs, grad_out, allow_unused=True)
        ends = [(out, grad_out), *self._states.reached(state)]
        incoming = list(state.incoming.values())
        found = torch.autograd.grad([e[0] for e in ends], [*incoming, *inputs], [e[1] for e in ends], allow_unused=True)
        self._states.receive(number, state, found[: len(incoming)])
        return found[len(incoming) :]

    def _state(self, tiles: BackwardPass, index: int) -> TileState | None:
        """The state that a tile begins with, if the layer carries one."""
        start, end = tiles.span(index)
        return None if self._states is None else self._states.again(tiles.number(index), end - start)

    def _receive(self, transport: KeyTransport, gradients: list[tuple[Tensor, Tensor]]) -> None:
        """Send the gradients of halos; take those of own keys on to the layer's input, from all who have seen them."""
        received = transport.scatter(gradients)
        for number, index, *grad in late_tiles(transport, self._work.stretches, self._work.tile, received):
            tiles = self._passes[number]
            hidden = self._restore(tiles.number(index)).requires_grad_(self._needs_hidden)
            with torch.enable_grad():
                projected = _project_keys(self._work.call, hidden, tiles.projection_tile(index))
            ends = [
                (out, d) for out, d in zip((projected.key, projected.value), grad, strict=True) if out.requires_grad
            ]
            if not ends:
                continue
            inputs = [hidden, *self._wanted] if self._needs_hidden else self._wanted
            grads = torch.autograd.grad([e[0] for e in ends], inputs, [e[1] for e in ends], allow_unused=True)
            if self._needs_hidden:
                assert self.grad_hidden is not None, "the layer's tiles come first"
                start, end = tiles.span(index)
                self.grad_hidden[:, start:end] += grads[0]
                grads = grads[1:]
            self.sums.add(grads)

    def _project_without_grad(self, number: int, index: int) -> KeysProjected:
        tiles = self._passes[number]
        with torch.no_grad():
            return _project_keys(self._work.call, self._restore(tiles.number(index)), tiles.projection_tile(index))

    def _restore(self, number: int) -> Tensor:
        """A tile's input again, and the random state that it was computed in."""
        hidden = self._saved_input.get(number).detach()
        state = self._random[number]
        if state is not None:
            state.restore(hidden.device)
        return hidden


def _forward(
    hidden: Tensor,
    work: _Work,
    saved: _Saved | None,
    states: CarriedStates | None,
    *,
    may_overwrite: bool,
) -> tuple[Tensor, list[VisibleKeys], list[RandomState | None]]:
    """All tiles first to last; without ``saved`` for no backward. May write the output over ``hidden``."""
    passes = work.forward_passes(None if saved is None else saved.attention)
    planned: dict[int, RandomState] = {}  # random states that tiles must begin with, as their keys have begun with it
    if work.sequence is not None:

        def project(number: int, index: int) -> KeysProjected:
            tiles = passes[number]
            start, end = tiles.span(index)
            planned[tiles.number(index)] = RandomState.fresh(hidden.device)
            return _project_keys(work.call, hidden[:, start:end], tiles.projection_tile(index))

        _exchange_halos(work, passes, project)
    random: list[RandomState | None] = []
    result: Tensor | None = None
    for tiles in passes:
        for index in range(tiles.num_tiles):
            tile, number = tiles.tile(index), tiles.number(index)
            start, end = tile.span
            part = hidden[:, start:end]
            if number in planned:
                planned[number].restore(hidden.device)
            before = RandomState.now(hidden.device)
            state = None if states is None else states.enter(number, end - start)
            if saved is None:
                out = work.call.run(part, tile, state)
            else:
                saved.input.put(number, part)
                with saved.products.saving(work.call.layer, number, but=saved.unread):
                    out = work.call.run(part, tile, state)
            if states is not None and state is not None:
                states.leave(state)
            random.append(None if before.same(RandomState.now(hidden.device)) else before)
            if result is None:
                same = out.dtype == hidden.dtype and out.shape == part.shape and hidden.is_contiguous()
                fits = may_overwrite and same
                result = hidden if fits else host_memory.empty(out, (*hidden.shape[:2], *out.shape[2:]))
            if saved is not None:
                saved.input.settle(number)
            result[:, start:end] = out
        tiles.release()
    visible = [tiles.visible_keys(attends=work.call.attends) for tiles in passes]
    assert result is not None, "a layer of no tokens"
    return result, visible, random


def _exchange_halos(
    work: _Work, passes: Sequence[ForwardPass | BackwardPass], project: Callable[[int, int], KeysProjected]
) -> KeyTransport:
    """Let each stretch see the keys before it that other stretches have."""
    assert work.sequence is not None
    transport, sent = project_sent(work.sequence, work.tile, project)
    halos = [
        tiles.begin_with_halo(transport.schedule(number), transport.halo(number), like)
        for number, (tiles, like) in enumerate(zip(passes, sent, strict=True))
    ]
    transport.gather(sent, halos)
    return transport


def _project_keys(
    call: LayerCall, hidden: Tensor, tile: ProjectionTile, state: TileState | None = None
) -> KeysProjected:
    """Run a layer up to a tile's keys and values."""
    try:
        call.run(hidden, tile, state)
    except KeysProjected as projected:
        return projected
    raise AssertionError("a layer went on after its keys and values were known")


def _gradient_memory(grad_out: Tensor, hidden: Tensor, donated: bool) -> Tensor:
    """Where dx goes: over dy if that was donated and dx looks the same."""
    if donated and grad_out.dtype == hidden.dtype and grad_out.shape[2:] == hidden.shape[2:]:
        return grad_out
    return host_memory.empty(hidden, (*grad_out.shape[:2], *hidden.shape[2:]))


def _is_watched(layer: nn.Module) -> bool:
    """Whether a hook may hold on to the layer's input or output (transformers collects hidden states that way)."""
    return forward_is_hooked(layer)
