"""A sequence that several processes share: what the sweep asks of it, and the two ways keys and gradients travel.

A process has one or two *stretches* of consecutive tokens. Attention is causal, so a stretch needs from outside only
keys and values of tokens before it, its *halo*: everything before it for exact attention, half a group of half of the
heads for shifted attention, a window's length for sliding windows.

    forward     keys and values of the tokens that others need are projected first and sent; then each stretch is swept
                with its halo in front
    backward    the halos again; each stretch is swept backward, which also adds to the gradients of its halo; these go
                back to their owners, who enter the layer once more, up to the keys, with what they have received

The last step is exact because a gradient is linear: what reaches a key from other processes may be carried through its
projection on its own. So no process waits for another's sweep, in either direction.

How the pieces travel is not decided here (``parallel/halo.py``).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longfit.attention.visibility import Schedule


@dataclass(frozen=True)
class AttentionKind:
    """What a layer's attention asks for; decides which keys travel. Hashable."""

    num_heads: int
    num_kv_heads: int
    group_size: int | None
    sliding_window: int | None


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of this process: ``[start, start + num_tokens)`` of its own, tiles from ``first_tile`` on."""

    start: int
    num_tokens: int
    first_tile: int = 0


class KeyTransport(Protocol):
    """Which keys travel between the processes of a sequence for one kind of attention, and the travelling."""

    def schedule(self, stretch: int) -> Schedule:
        """What the tokens of a stretch see, the tokens numbered from the first of its halo."""
        ...

    def halo(self, stretch: int) -> int:
        """Tokens in front of a stretch that it sees."""
        ...

    def sent_from(self, stretch: int) -> int:
        """The first token of a stretch (counted in it) that any other stretch sees; its length if none does."""
        ...

    def gather(self, keys: Sequence[tuple[Tensor, Tensor]], halos: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Exchange keys and values of the sent tokens, ``[B, K, n, D]`` a stretch, for those of the halos."""
        ...

    def scatter(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Exchange gradients of the halos for the sums of those of the sent tokens."""
        ...


class SharedSequence(Protocol):
    """What this process has of a sequence."""

    def stretches(self, tile: int) -> tuple[Stretch, ...]:
        """Its stretches, in tiles of so many tokens."""
        ...

    def transport(self, kind: AttentionKind) -> KeyTransport:
        """How keys travel for a layer; the same object for the same question."""
        ...


class KeysProjected(Exception):
    """Raised through a layer once the keys and values of a tile are known: nothing after them is wanted."""

    def __init__(self, key: Tensor, value: Tensor, kind: AttentionKind) -> None:
        super().__init__("a layer went on after its keys and values were known")
        self.key, self.value, self.kind = key, value, kind


def whole(num_tokens: int) -> tuple[Stretch, ...]:
    """The one stretch of a sequence that is not shared."""
    return (Stretch(0, num_tokens),)


def num_tiles(stretch: Stretch, tile: int) -> int:
    """Tiles of a stretch, of which the last may be short."""
    return -(-stretch.num_tokens // tile)


def project_sent(
    sequence: SharedSequence, tile: int, keys_of: Callable[[int, int], KeysProjected]
) -> tuple[KeyTransport, list[tuple[Tensor, Tensor]]]:
    """Project the keys and values that others need, ``[B, K, n, D]`` a stretch; returns how they travel too.

    Args:
        sequence: what this process has.
        tile: tokens per tile.
        keys_of: ``(stretch, index)`` -> the keys and values of that tile.
    """
    stretches = sequence.stretches(tile)
    sent = []
    for number, stretch in enumerate(stretches):
        last = num_tiles(stretch, tile) - 1
        projected = [keys_of(number, last)]
        transport = sequence.transport(projected[0].kind)
        first = transport.sent_from(number)
        projected += [keys_of(number, index) for index in reversed(range(first // tile, last))]
        known = projected[-1:0:-1] + projected[:1]
        skipped = first - (last - len(known) + 1) * tile
        sent.append(
            (
                torch.cat([one.key for one in known], 2)[:, :, skipped:],
                torch.cat([one.value for one in known], 2)[:, :, skipped:],
            )
        )
    return transport, sent


def late_tiles(
    transport: KeyTransport, stretches: Sequence[Stretch], tile: int, received: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield ``(stretch, index, dK, dV)`` for each tile whose keys others have seen; ``[B, K, t, D]`` of the tile."""
    for number, (stretch, gradients) in enumerate(zip(stretches, received, strict=True)):
        first = transport.sent_from(number)
        for index in range(first // tile, num_tiles(stretch, tile)):
            low, high = index * tile, min((index + 1) * tile, stretch.num_tokens)
            if high <= first:
                continue
            before = max(first - low, 0)  # tokens of the tile that nobody else has seen
            parts = [gradient[:, :, max(low - first, 0) : high - first] for gradient in gradients]
            key, value = (torch.nn.functional.pad(part, (0, 0, before, 0)) for part in parts)
            yield number, index, key, value
