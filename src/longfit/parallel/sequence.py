"""One window over several processes: which tokens are whose, and the training loss of this process's part.

Everything that looks at neighbours is done before the window is cut: labels are shifted, documents are found, and
position numbers are those of the whole window. Only attention crosses the cuts, and ``halo.py`` carries it. The loss of
a process is the sum over its own tokens, divided by the trained tokens of the whole optimiser step, so that the parts
of all processes add up to the loss of the window.

The window is lengthened at its end until it can be cut evenly, by documents of one token that nobody is trained on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from longfit.attention.visibility import build_schedule, document_starts
from longfit.engine.hf_model import base_model
from longfit.engine.loss.training_loss import shifted_labels, training_loss
from longfit.engine.sweep.probe import nature_of
from longfit.engine.sweep.shared_sequence import AttentionKind, Stretch
from longfit.engine.sweep.sweeper import sweeper_of
from longfit.errors import ModelError
from longfit.numerics.labels import IGNORED
from longfit.parallel.halo import HaloTransport, OwnedTokens, Traffic, cut, num_segments


class SharedWindow:
    """This process's part of one batch of windows; what a swept layer asks is answered once per kind of attention."""

    def __init__(
        self, starts: Tensor, *, segments: tuple[OwnedTokens, ...], group: dist.ProcessGroup, traffic: Traffic
    ) -> None:
        """Take part in a window.

        Args:
            starts: int32 ``[B, T]``, the first token of the document of each token of the whole window.
            segments: how the window is cut.
            group: the processes that share it.
            traffic: counts what is sent.
        """
        self._starts, self._segments, self._group, self._traffic = starts, segments, group, traffic
        rank = dist.get_rank(group)
        self._own = tuple(number for number, segment in enumerate(segments) if segment.owner == rank)
        self._transports: dict[AttentionKind, HaloTransport] = {}

    @property
    def tokens(self) -> Tensor:
        """The numbers of this process's tokens in the window, int64 ``[t]``."""
        own = [self._segments[number] for number in self._own]
        return torch.cat([torch.arange(segment.start, segment.end) for segment in own])

    def stretches(self, tile: int) -> tuple[Stretch, ...]:
        """The own segments as the sweep goes over them."""
        found, start, first_tile = [], 0, 0
        for number in self._own:
            size = self._segments[number].end - self._segments[number].start
            found.append(Stretch(start, size, first_tile))
            start, first_tile = start + size, first_tile - (-size // tile)
        return tuple(found)

    def transport(self, kind: AttentionKind) -> HaloTransport:
        """How keys travel for one kind of attention."""
        if kind not in self._transports:
            schedule = build_schedule(
                kind.num_heads, self._starts, group_size=kind.group_size, sliding_window=kind.sliding_window
            )
            self._transports[kind] = HaloTransport(
                schedule, self._segments, self._own, kind.num_kv_heads, self._group, self._traffic
            )
        return self._transports[kind]


class SequenceParallelLoss:
    """`training_loss` for a process that has a part of each window; called with the whole windows, as that is."""

    def __init__(self, group: dist.ProcessGroup, *, balanced: bool) -> None:
        """Share windows.

        Args:
            group: the processes that share a window.
            balanced: as in ``halo.py:cut``; for exact attention.
        """
        self.group, self.balanced, self.traffic = group, balanced, Traffic()

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        *,
        num_items: int | Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        engine: Literal["sweep", "plain"] = "sweep",
    ) -> Tensor:
        """Return this process's part of the loss.

        Args:
            model, input_ids, labels, position_ids: of the whole windows, as for `training_loss`.
            engine: as for `training_loss`; "plain" is refused.
            num_items: trained tokens of the whole optimiser step.
        Raises: ModelError: a layer is not swept, or the positions depend on the length of what a process has.
        """
        require_shareable(model, engine=engine)
        batch, num_tokens = input_ids.shape
        targets = shifted_labels(input_ids, labels, position_ids, None)
        if position_ids is None:
            position_ids = torch.arange(num_tokens, device=input_ids.device).expand(batch, -1)
        size = num_segments(dist.get_world_size(self.group), balanced=self.balanced)
        more = -num_tokens % size
        # Positions that stand still begin documents, so the added tokens see nothing and are seen by nobody.
        ids, positions, targets = (
            F.pad(x, (0, more), value=fill) for x, fill in ((input_ids, 0), (position_ids, 0), (targets, IGNORED))
        )
        starts = document_starts(batch, num_tokens + more, position_ids=positions)
        segments = cut(num_tokens + more, dist.get_world_size(self.group), balanced=self.balanced)
        window = SharedWindow(starts, segments=segments, group=self.group, traffic=self.traffic)
        own = window.tokens.to(input_ids.device)
        with sharing(model, window):
            return training_loss(
                model, ids[:, own], position_ids=positions[:, own], shift_labels=targets[:, own], num_items=num_items
            )


@contextmanager
def sharing(model: nn.Module, window: SharedWindow) -> Iterator[None]:
    """Let the swept layers of a model take part in a window."""
    sweeper = sweeper_of(model)
    assert sweeper is not None, "checked by require_shareable"
    sweeper.sequence = window
    try:
        yield
    finally:
        sweeper.sequence = None


def require_shareable(model: nn.Module, *, engine: str = "sweep") -> None:
    """Refuse a model whose layers cannot share a window.

    Raises: ModelError: some layer is not swept; something besides attention mixes tokens, which nobody would carry over
        a border; the head is not known; or rotary tables depend on the length of the tokens at hand.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    base, sweeper = base_model(model), sweeper_of(model)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    left = [name for name, layer in layers.items() if sweeper is None or layer not in sweeper.swept]
    if left or sweeper is None or not layers or engine != "sweep":
        named = f"{left[0]} and {len(left) - 1} more" if len(left) > 1 else (left or [type(base).__name__])[0]
        raise ModelError(
            f"{named}: not swept, and only swept layers can share a window; use engine.engine=sweep, and a family whose"
            " layers all are, or parallel.sequence=1"
        )
    nature = nature_of(model)
    nature.require_head()
    if nature.packs is not None or nature.causal is not None:
        raise ModelError(f"{nature.packs or nature.causal}: a window of it cannot be shared; use parallel.sequence=1")
    for kind in _rope_kinds(base.config.get_text_config()):
        if kind in ("dynamic", "longrope"):
            raise ModelError(
                f"rope {kind!r}: its tables depend on the length of the tokens that a process has, not of the window;"
                " use context.rope=yarn, linear or theta, or parallel.sequence=1"
            )


def _rope_kinds(config: Any) -> list[str]:
    """The kinds of rotary embedding in a model's configuration; it may have one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return [str(part.get("rope_type", "default")) for part in (nested or [parameters])]


def sequence_group(sharers: list[list[int]], rank: int) -> dist.ProcessGroup:
    """Make the groups of processes that share windows, in every process, and return one's own."""
    groups = {tuple(ranks): dist.new_group(ranks) for ranks in sharers}
    own: dist.ProcessGroup = next(group for ranks, group in groups.items() if rank in ranks)
    return own
