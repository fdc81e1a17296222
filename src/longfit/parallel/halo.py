"""Which keys and values travel between the processes of a sequence, and one uneven all-to-all that carries them.

    halo          the tokens in front of a segment that it sees, for each key/value head on its own: with shifted
                  attention, only the heads of shifted queries see across a border between whole groups
    piece         what one segment sees of another: a run of key/value heads, a range of tokens
    parcel        the pieces of one segment that a process needs for all of its own, sent once

Everybody computes all pieces from the same schedule, so nothing is asked for. Keys go from owners to those who see them
(`gather`); gradients go back the same way and are added up (`scatter`). Pieces between two stretches of one process are
copied. With shifted attention and a border between whole groups, a process sends half a group of half of the heads,
whatever the context and the number of processes.

Every process takes part in every exchange, with nothing to send as well; else the others would wait for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from longfit.attention.visibility import Schedule

KeyValue = tuple[Tensor, Tensor]  # [B, K, n, D] twice; the values may have another D


@dataclass(frozen=True)
class OwnedTokens:
    """The tokens ``[start, end)`` of a sequence and the process that has them."""

    start: int
    end: int
    owner: int


@dataclass(frozen=True)
class SentKeys:
    """The tokens ``[low, high)`` of some key/value heads of segment ``source``, seen by segment ``target``."""

    source: int
    target: int
    heads: slice
    low: int
    high: int


@dataclass(frozen=True)
class Parcel:
    """Pieces of one segment for one process: the longest of them, and others that are its last tokens."""

    longest: SentKeys
    pieces: tuple[SentKeys, ...]

    def part(self, piece: SentKeys, tensor: Tensor) -> Tensor:
        """A piece of a tensor ``[B, k, n, D]`` that holds the longest."""
        return tensor[:, :, piece.low - self.longest.low :]


def find_parcels(pieces: Sequence[SentKeys], segments: Sequence[OwnedTokens]) -> list[Parcel]:
    """Put together what travels from one segment to one process."""
    together: dict[tuple[int, int, int, int], list[SentKeys]] = {}
    for piece in pieces:
        way = (piece.source, segments[piece.target].owner, piece.heads.start, piece.heads.stop)
        together.setdefault(way, []).append(piece)
    return [Parcel(min(found, key=lambda piece: piece.low), tuple(found)) for found in together.values()]


_Read = Callable[[Parcel], list[Tensor]]
_Write = Callable[[Parcel, list[Tensor]], None]


@dataclass
class Traffic:
    """Bytes that this process has sent to others."""

    keys: int = 0
    gradients: int = 0

    def taken(self) -> int:
        """Return the bytes since the last call."""
        sent, self.keys, self.gradients = self.keys + self.gradients, 0, 0
        return sent


def cut(num_tokens: int, num_processes: int, *, balanced: bool) -> tuple[OwnedTokens, ...]:
    """Cut a sequence into equal segments, in the order of its tokens.

    Args:
        num_tokens: a multiple of ``num_segments``.
        balanced: give each process two segments, one from the front and its mirror image from the back: with exact
            attention all have the same work then. Else each has one, and the fewest bytes travel.
    """
    count = num_segments(num_processes, balanced=balanced)
    size = num_tokens // count
    owners = [*range(num_processes), *(reversed(range(num_processes)) if balanced else ())]
    return tuple(OwnedTokens(number * size, (number + 1) * size, owner) for number, owner in enumerate(owners))


def num_segments(num_processes: int, *, balanced: bool) -> int:
    """Segments of a sequence."""
    return num_processes * (2 if balanced else 1)


def find_pieces(schedule: Schedule, segments: Sequence[OwnedTokens], *, num_kv_heads: int) -> list[SentKeys]:
    """Say what every segment sees of every other.

    Args:
        schedule: of the whole sequence.
    """
    pieces = []
    for target, segment in enumerate(segments):
        for heads, low in _first_seen(schedule, segment.start, num_kv_heads):
            for source, other in enumerate(segments[:target]):
                if other.end > low:
                    pieces.append(SentKeys(source, target, heads, max(low, other.start), other.end))
    return pieces


def _first_seen(schedule: Schedule, token: int, num_kv_heads: int) -> list[tuple[slice, int]]:
    """The first token that ``token`` and all later ones see, for each run of key/value heads that see alike."""
    repeats = schedule.num_heads // num_kv_heads
    first = [token] * num_kv_heads
    for number, (begin, end) in enumerate(pairwise(schedule.head_bounds)):
        low = int(schedule.host[number, :, token].min())
        for head in range(begin // repeats, (end - 1) // repeats + 1):
            first[head] = min(first[head], low)
    runs = []
    for low, heads in groupby(range(num_kv_heads), key=first.__getitem__):
        members = list(heads)
        runs.append((slice(members[0], members[-1] + 1), low))
    return runs


@dataclass(eq=False)
class HaloTransport:
    """Exchanges halos for one kind of attention; see ``engine/sweep/shared_sequence.py:KeyTransport``.

    Args:
        whole: what every token of the sequence sees.
        segments: of the whole sequence.
        own: the numbers of this process's segments.
        num_kv_heads: K.
        group: the processes of the sequence; ``OwnedTokens.owner`` is a rank in it.
        traffic: counts what is sent.
    """

    whole: Schedule
    segments: tuple[OwnedTokens, ...]
    own: tuple[int, ...]
    num_kv_heads: int
    group: dist.ProcessGroup
    traffic: Traffic
    pieces: list[SentKeys] = field(init=False)
    parcels: list[Parcel] = field(init=False)

    def __post_init__(self) -> None:
        self.pieces = find_pieces(self.whole, self.segments, num_kv_heads=self.num_kv_heads)
        self.parcels = find_parcels(self.pieces, self.segments)
        self._rank = self.segments[self.own[0]].owner
        travelling = [piece for piece in self.pieces if self._owner(piece.source) != self._owner(piece.target)]
        self._travelling = bool(travelling)

    def schedule(self, stretch: int) -> Schedule:
        """What the tokens of a stretch see, numbered from the first of its halo."""
        return self.whole.since(self._first(stretch), self.segments[self.own[stretch]].end)

    def halo(self, stretch: int) -> int:
        """Tokens in front of a stretch that it sees."""
        return self.segments[self.own[stretch]].start - self._first(stretch)

    def sent_from(self, stretch: int) -> int:
        """The first token of a stretch, counted in it, that another sees."""
        segment = self.segments[self.own[stretch]]
        return min((p.low for p in self.pieces if p.source == self.own[stretch]), default=segment.end) - segment.start

    def gather(self, keys: Sequence[KeyValue], halos: Sequence[KeyValue]) -> None:
        """Exchange keys and values of the sent tokens for those of the halos; what nobody needs stays as it is."""

        def read(parcel: Parcel) -> list[Tensor]:
            return self._sent(keys, parcel.longest)

        def write(parcel: Parcel, parts: list[Tensor]) -> None:
            for piece in parcel.pieces:
                for place, part in zip(self._seen(halos, piece), parts, strict=True):
                    place.copy_(parcel.part(piece, part))

        self.traffic.keys += self._exchange(keys, read, write, backward=False)

    def scatter(self, gradients: Sequence[KeyValue]) -> list[KeyValue]:
        """Exchange gradients of the halos for the sums of those of the sent tokens."""
        sums: list[KeyValue] = []
        for number, (key, value) in enumerate(gradients):
            segment = self.segments[self.own[number]]
            count = segment.end - segment.start - self.sent_from(number)
            sums.append((_zeros(key, count), _zeros(value, count)))

        def read(parcel: Parcel) -> list[Tensor]:
            found = self._seen(gradients, parcel.longest)
            others = [piece for piece in parcel.pieces if piece is not parcel.longest]
            if others:
                found = [part.clone() for part in found]
            for piece in others:
                for total, part in zip(found, self._seen(gradients, piece), strict=True):
                    parcel.part(piece, total).add_(part)
            return found

        def write(parcel: Parcel, parts: list[Tensor]) -> None:
            for place, part in zip(self._sent(sums, parcel.longest), parts, strict=True):
                place.add_(part)

        self.traffic.gradients += self._exchange(gradients, read, write, backward=True)
        return sums

    def _exchange(self, like: Sequence[KeyValue], read: _Read, write: _Write, *, backward: bool) -> int:
        """Carry all parcels, one way or back; returns the bytes sent to other processes."""
        mine = self._rank
        size = dist.get_world_size(self.group)
        outgoing: list[list[Parcel]] = [[] for _ in range(size)]
        incoming: list[list[Parcel]] = [[] for _ in range(size)]
        for parcel in self.parcels:
            source, target = self._owner(parcel.longest.source), self._owner(parcel.longest.target)
            if backward:
                source, target = target, source
            if source == target == mine:
                write(parcel, read(parcel))
            elif source == mine:
                outgoing[target].append(parcel)
            elif target == mine:
                incoming[source].append(parcel)
        if not self._travelling:
            return 0
        key, value = like[0]
        sent = [torch.cat([_bytes(part) for part in read(parcel)]) for parcels in outgoing for parcel in parcels]
        send = torch.cat(sent) if sent else _bytes(key[:, :, :0])
        out_sizes, in_sizes = (
            [sum(_num_bytes(parcel.longest, key, value) for parcel in parcels) for parcels in ways]
            for ways in (outgoing, incoming)
        )
        received = send.new_empty(sum(in_sizes))
        dist.all_to_all_single(received, send, in_sizes, out_sizes, group=self.group)
        at = 0
        for parcels in incoming:
            for parcel in parcels:
                parts, piece = [], parcel.longest
                for x in (key, value):
                    shape = (x.shape[0], piece.heads.stop - piece.heads.start, piece.high - piece.low, x.shape[3])
                    end = at + _size(shape) * x.element_size()
                    parts.append(received[at:end].clone().view(x.dtype).view(shape))  # a copy is aligned for any type
                    at = end
                write(parcel, parts)
        return sum(out_sizes)

    def _sent(self, tensors: Sequence[KeyValue], piece: SentKeys) -> list[Tensor]:
        """A piece among the sent tokens of its source."""
        number = self.own.index(piece.source)
        first = self.segments[piece.source].start + self.sent_from(number)
        return [x[:, piece.heads, piece.low - first : piece.high - first] for x in tensors[number]]

    def _seen(self, tensors: Sequence[KeyValue], piece: SentKeys) -> list[Tensor]:
        """A piece in the halo of its target."""
        number = self.own.index(piece.target)
        first = self._first(number)
        return [x[:, piece.heads, piece.low - first : piece.high - first] for x in tensors[number]]

    def _first(self, stretch: int) -> int:
        number = self.own[stretch]
        return min((p.low for p in self.pieces if p.target == number), default=self.segments[number].start)

    def _owner(self, segment: int) -> int:
        return self.segments[segment].owner


def _zeros(x: Tensor, num_tokens: int) -> Tensor:
    return x.new_zeros(*x.shape[:2], num_tokens, x.shape[3])


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1] * shape[2] * shape[3]


def _num_bytes(piece: SentKeys, key: Tensor, value: Tensor) -> int:
    """Bytes of a piece of keys and values like these."""
    vectors = key.shape[0] * (piece.heads.stop - piece.heads.start) * (piece.high - piece.low)
    return vectors * (key.shape[3] * key.element_size() + value.shape[3] * value.element_size())
