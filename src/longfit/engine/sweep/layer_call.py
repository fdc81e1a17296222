"""A call of a decoder layer, as the gradient-checkpointing function is given it, repeated on one tile of tokens.

Whatever the layer is given per token (rotary tables, positions, per-layer inputs) is cut; what describes the whole
sequence is passed on whole, because the attention function wants it so.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from longfit.engine.sweep.recurrent_state import Carrying, TileState
from longfit.engine.sweep.tile_pass import SweptTile
from longfit.errors import ModelError

WHOLE = ("attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Keyword arguments that describe the whole sequence: the attention function wants them uncut."""

BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""Keyword arguments that describe the borders of documents to a recurrence, of the whole sequence."""

CACHES = ("cache", "past_key_values", "past_key_value", "cache_params")
"""Keyword arguments that take a cache, one in each family."""


@dataclass(frozen=True)
class LayerCall:
    """A layer's raw forward and what it was called with; calls it again on one tile of tokens.

    Attributes:
        layer, function, args, keywords: the forward is called with the layer, hidden states, and these.
        num_tokens: of the hidden states.
        carrying: how a state is carried from tile to tile; None for a layer that carries none.
    """

    layer: nn.Module
    function: Callable[..., Any]
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    num_tokens: int
    carrying: Carrying | None = None

    @property
    def carries_gradient(self) -> bool:
        """Whether an argument besides the hidden states needs a gradient, which the sweep would lose."""
        return _carries_gradient((self.args, self.keywords))

    @property
    def tells_borders(self) -> bool:
        """Whether the layer is told in another way than by positions where documents begin."""
        return any(self.keywords.get(name) is not None for name in BORDERS)

    @property
    def cache_argument(self) -> str | None:
        """The keyword that takes a cache and is given none; None if there is no such keyword."""
        return next((name for name in CACHES if name in self.keywords and self.keywords[name] is None), None)

    @property
    def attends(self) -> bool:
        """Whether the layer attends, as all do that carry no state."""
        return self.carrying is None or self.carrying.attends

    @property
    def position_ids(self) -> Tensor | None:
        """Positions ``[B or 1, T]`` of the whole sequence; None if the layer is not given any."""
        positions: Tensor | None = self.keywords.get("position_ids")
        return positions

    def run(self, hidden: Tensor, tile: SweptTile, state: TileState | None = None) -> Tensor:
        """Run the layer on a tile's hidden states, ``[B, t, D]`` -> ``[B, t, D]``, from a state if it carries one.

        Raises: ModelError: it did not attend through longfit's attention, or is given what cannot be cut into tiles.
        """
        start, end = tile.span
        cut = partial(cut_tokens, start=start, end=end, num_tokens=self.num_tokens)
        uncut = WHOLE if self.attends else ()
        keywords = {name: value if name in uncut else cut(value) for name, value in self.keywords.items()}
        if self.carrying is not None:
            keywords[self.carrying.argument] = state
        out = self.function(self.layer, hidden, *map(cut, self.args), **keywords, sweep=tile)
        if self.attends and not tile.attended:
            raise ModelError(
                f"{type(self.layer).__name__} did not attend through longfit's attention: the attention implementation"
                " was changed after enable_sweep; call enable_sweep(model) again"
            )
        return out[0] if isinstance(out, tuple) else out


def cut_tokens(value: Any, *, start: int, end: int, num_tokens: int) -> Any:
    """Take the tokens [start, end) of whatever is given per token: tensors, and tuples, lists or dicts of them."""
    if end - start == num_tokens:
        return value
    again = partial(cut_tokens, start=start, end=end, num_tokens=num_tokens)
    if isinstance(value, dict):
        return {key: again(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(again, value))
    if not isinstance(value, Tensor):
        return value
    axes = [axis for axis, size in enumerate(value.shape) if size == num_tokens]
    if len(axes) > 1 and axes[:1] != [1]:
        raise ModelError(
            f"a layer is given a tensor of shape {tuple(value.shape)} for {num_tokens} tokens, which cannot be cut into"
            " tiles; masks over pairs of tokens must come as a 2-D padding mask"
        )
    return value.narrow(1 if 1 in axes else axes[0], start, end - start) if axes else value


def layer_call(function: Any, args: tuple[Any, ...]) -> tuple[LayerCall, Tensor]:
    """Take apart ``partial(forward, layer, **keywords)`` and its arguments, which get their names."""
    keywords = dict(function.keywords)
    if not args:
        args = (keywords.pop("hidden_states"),)
    hidden, rest = args[0], args[1:]
    names = _positional(function.func)[2:]  # after self and the hidden states
    keywords |= dict(zip(names, rest, strict=False))
    return LayerCall(function.args[0], function.func, rest[len(names) :], keywords, hidden.shape[1]), hidden


def _positional(function: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    return [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in kinds]


def _carries_gradient(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_carries_gradient, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_carries_gradient, value))
    return isinstance(value, Tensor) and value.requires_grad
