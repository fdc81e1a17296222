"""The state that a layer carries from tile to tile besides keys and values: recurrences and convolutions.

A gated delta net, a Mamba layer or a short convolution reads a sequence in pieces if it is given a cache: that is how
transformers reads a long prompt. Here a layer is given one made for differentiation, in the argument of that name:

    forward     a tile begins with the state that the tile before left; the state is saved at each border
    backward    tiles last to first: a tile begins with its saved state, which receives a gradient; it is the gradient
                of the state that the tile before leaves
    documents   no tile crosses the border of a document; a row whose document begins has no state

The caches of transformers copy each state into storage of their own, in place, where no gradient follows it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longfit.attention.visibility import document_starts
from longfit.compat.torch import holds_values
from longfit.engine.offload.activations import SavedInput
from longfit.engine.sweep.shared_sequence import Stretch, num_tiles, whole

Key = tuple[str, int, int]
"""Which state: ``"conv"`` or ``"recurrent"``, the layer's index, and the state's index in the layer."""


@dataclass(frozen=True)
class Carrying:
    """How a layer carries a state.

    Attributes:
        argument: the keyword that takes its cache.
        attends: whether it attends, too.
        state: what it carries, in words.
    """

    argument: str
    attends: bool
    state: str


class TileState:
    """What a layer carries into one tile and out of it, with the methods of transformers' ``Cache``.

    Attributes:
        incoming: the states before the first token.
        has_keys: whether the layer has handed keys and values over.
    """

    def __init__(self, incoming: Mapping[Key, Tensor], num_tokens: int) -> None:
        """Begin a tile.

        Args:
            incoming: the states before its first token; none where the sequence begins.
            num_tokens: of the tile.
        """
        self.incoming = dict(incoming)
        self.has_keys = False
        self._may_be_changed = num_tokens == 1  # kernels for one token write the new state over the old one
        self._handed_out: dict[Key, Tensor] = {}
        self._updated: dict[Key, Tensor] = {}

    @property
    def outgoing(self) -> dict[Key, Tensor]:
        """The states after the last token."""
        return self._handed_out | self._updated

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The last inputs of a convolution, ``[B, C, kernel size - 1]``; None where the sequence begins."""
        return self._get(("conv", layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state of a recurrence; None where the sequence begins."""
        return self._get(("recurrent", layer_idx, state_idx))

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        *,
        conv_kernel_size: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Keep the last inputs ``[B, C, t]`` of a convolution; returns them behind those before the tile."""
        key = ("conv", layer_idx, state_idx)
        before = self.incoming.get(key)
        inputs = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size - 1
        missing = max(size - inputs.shape[-1], 0)
        self._updated[key] = F.pad(inputs[..., inputs.shape[-1] - size + missing :], (missing, 0))
        return inputs

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> Tensor:
        """Keep the state of a recurrence."""
        self._updated["recurrent", layer_idx, state_idx] = recurrent_states
        return recurrent_states

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Return a tile's keys and values as they are: those before it are the sweep's own."""
        self.has_keys = True
        return key, value

    def is_recording_past(self, layer_idx: int) -> bool:
        """Say that no kernel for one token is to write over the last inputs of a convolution."""
        return True

    def _get(self, key: Key) -> Tensor | None:
        state = self.incoming.get(key)
        if state is not None and self._may_be_changed:
            state = self._handed_out[key] = state.clone()
        return state


class CarriedStates:
    """The states at the tile borders of one layer's pass: put in forward, taken back with their gradient in backward.

    Attributes:
        continuing: by the number of a tile at whose first token documents begin: rows ``[B]`` whose document goes on
            there, or None if every row begins one.
    """

    def __init__(self, saved: SavedInput | None, continuing: Mapping[int, Tensor | None]) -> None:
        self._saved, self._continuing = saved, continuing
        self._places: dict[int, dict[Key, int]] = {}  # number of a tile -> which state -> its number among the saved
        self._num_saved = 0
        self._last: dict[Key, Tensor] = {}  # states after the tile before
        self._gradients: dict[Key, Tensor] = {}  # of the states after the tile at hand

    def enter(self, number: int, num_tokens: int) -> TileState:
        """Begin a tile of the forward pass."""
        incoming = self._of_documents_that_go_on(number, self._last)
        self._places[number] = {}
        for key, state in incoming.items():
            if self._saved is not None:
                self._saved.put(self._num_saved, state)
                self._saved.settle(self._num_saved)
            self._places[number][key] = self._num_saved
            self._num_saved += 1
        return TileState(incoming, num_tokens)

    def leave(self, state: TileState) -> None:
        """End a tile of the forward pass."""
        self._last = {key: tensor.detach().clone() for key, tensor in state.outgoing.items()}

    def again(self, number: int, num_tokens: int) -> TileState:
        """Begin a tile of the backward pass."""
        assert self._saved is not None, "nothing is saved without a backward"
        incoming = {}
        for key, place in self._places[number].items():
            state = self._saved.get(place).detach()
            incoming[key] = state.requires_grad_(state.is_floating_point())
        return TileState(incoming, num_tokens)

    def reached(self, state: TileState) -> list[tuple[Tensor, Tensor]]:
        """The states that a tile leaves and that need a gradient, each with it, as later tiles have found it."""
        out = state.outgoing
        return [(out[key], grad) for key, grad in self._gradients.items() if key in out and out[key].requires_grad]

    def receive(self, number: int, state: TileState, gradients: tuple[Tensor | None, ...]) -> None:
        """Take the gradients of the states that a tile began with; the tile before is next."""
        found = {key: grad for key, grad in zip(state.incoming, gradients, strict=True) if grad is not None}
        self._gradients = self._of_documents_that_go_on(number, found)

    def close(self) -> None:
        """Give the space back."""
        if self._saved is not None:
            self._saved.close()

    def _of_documents_that_go_on(self, number: int, states: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        if number not in self._continuing:
            return dict(states)
        rows = self._continuing[number]
        if rows is None:
            return {}
        return {key: torch.where(rows.view(-1, *[1] * (state.dim() - 1)), state, 0) for key, state in states.items()}


@contextmanager
def changed_in_place(state: TileState | None, num_tokens: int) -> Iterator[None]:
    """Let the kernels for one token write over a state that backward needs as it was."""
    if state is None or num_tokens > 1 or not state.incoming:
        yield
        return
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        yield


def has_documents(position_ids: Tensor | None, num_rows: int, num_tokens: int) -> bool:
    """Whether a document begins in the middle of some row."""
    return len(document_stretches(position_ids, num_rows, num_tokens, num_tokens)[0]) > 1


def document_stretches(
    position_ids: Tensor | None, num_rows: int, num_tokens: int, tile: int
) -> tuple[tuple[Stretch, ...], dict[int, Tensor | None]]:
    """Cut a sequence at every token at which a document of some row begins.

    Args:
        position_ids: ``[B or 1, T]``; None, or positions without values (on the meta device), is one document a row.
        num_rows, num_tokens, tile: B, T and the tokens of a tile.
    Returns: the pieces, and for the first tile of each the rows whose document goes on (``CarriedStates``).
    """
    if position_ids is None or position_ids.dim() != 2 or not holds_values(position_ids):
        return whole(num_tokens), {0: None}
    starts = document_starts(num_rows, num_tokens, position_ids=position_ids)
    begins = starts == torch.arange(num_tokens, device=starts.device)  # [B, T]
    borders = begins.any(0).nonzero().flatten().tolist()
    stretches: list[Stretch] = []
    continuing: dict[int, Tensor | None] = {}
    first_tile = 0
    for start, end in zip(borders, [*borders[1:], num_tokens], strict=True):
        stretches.append(Stretch(start, end - start, first_tile))
        goes_on = ~begins[:, start]
        continuing[first_tile] = goes_on if bool(goes_on.any()) else None
        first_tile += num_tiles(stretches[-1], tile)
    return tuple(stretches), continuing
