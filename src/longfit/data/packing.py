"""Tokens become windows of at most `context` tokens that a model is trained on.

A *piece* is a run of one document's tokens; a *window* is a row of pieces. Position ids restart at 0 in every piece,
which is how attention tells pieces apart (no piece sees another), and the first token of a piece is never a target,
because nothing it could be predicted from is in its window. Documents within the context stay whole. Longer ones fill
whole windows, without overlap, and what remains of them is packed with the short ones, best fit, longest first
(`best_fit.py`).

What this is not: LongLoRA's own preparation, which joins documents with an end token, ignores their boundaries and
pads. And the windows are descriptions: token ids stay where the tokenizer put them until a window is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longfit.data.best_fit import best_fit_decreasing, ranks
from longfit.data.document_table import DocumentTable, count_targets, table_of
from longfit.data.tokenized import TokenizedDocument
from longfit.errors import ConfigError, DataError
from longfit.numerics.labels import IGNORED

LONG_CHAT = ("error", "split", "truncate_left", "truncate_right", "drop")


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Runs of documents' tokens, as parallel arrays; `stop` may be one past the stored ids, for the end token."""

    document: np.ndarray  # int64 [P], index into the documents
    start: np.ndarray  # int64 [P]
    stop: np.ndarray  # int64 [P]

    def __len__(self) -> int:
        return len(self.document)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each piece, int64 ``[P]``."""
        return self.stop - self.start


class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows ready to train on, made by `pack`.

    Indexing gives one window as int64 tensors ``[T]``: `input_ids`; `position_ids`, restarting at 0 in every piece;
    `labels`, the token itself where it is a target and -100 elsewhere (not shifted: the loss shifts). `order(epoch)` is
    a shuffled order of the windows that is a function of the seed alone, so resuming is arithmetic: step s of a run
    that takes n windows a step continues at position s * n of the epochs' orders, one behind the other.
    """

    def __init__(
        self,
        documents: Sequence[TokenizedDocument],
        table: DocumentTable,
        pieces: Pieces,
        windows: np.ndarray,
        *,
        context: int,
        eos_token_id: int | None,
        pad_token_id: int | None = None,
        seed: int = 0,
    ) -> None:
        """Args: windows: int64 ``[W + 1]``, window w holds pieces windows[w] to windows[w + 1]."""
        self.documents, self.table, self.pieces, self.windows = documents, table, pieces, windows
        self.context, self.eos_token_id, self.pad_token_id, self.seed = context, eos_token_id, pad_token_id, seed
        self._order: tuple[int, np.ndarray] | None = None  # the epoch last asked for, and its order

    def __len__(self) -> int:
        return len(self.windows) - 1

    @property
    def window_lengths(self) -> np.ndarray:
        """Tokens of each window without padding, int64 ``[W]``."""
        return np.add.reduceat(self.pieces.lengths, self.windows[:-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        index %= len(self)
        spans = range(self.windows[index], self.windows[index + 1])
        used = int(self.pieces.lengths[spans.start : spans.stop].sum())
        length = used if self.pad_token_id is None else self.context
        input_ids = np.full(length, self.pad_token_id or 0, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        position_ids = np.zeros(length, dtype=np.int64)
        position_ids[used:] = np.arange(length - used)  # padding is a document of its own, so no mask is needed
        eos = IGNORED if self.eos_token_id is None else self.eos_token_id  # without one, no piece reaches past its ids
        offset = 0
        for piece in spans:
            document = self.documents[self.pieces.document[piece]]
            start, stop = int(self.pieces.start[piece]), int(self.pieces.stop[piece])
            end = offset + stop - start
            ids = document.input_ids[start:stop]
            input_ids[offset : offset + len(ids)] = ids
            if len(ids) < stop - start:
                input_ids[end - 1] = eos
            position_ids[offset:end] = np.arange(stop - start)
            targets = input_ids[offset + 1 : end]
            if document.trained is not None:
                targets = np.where(document.trained[start + 1 : stop], targets, IGNORED)
            labels[offset + 1 : end] = targets
            offset = end
        columns = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def order(self, epoch: int) -> np.ndarray:
        """Return the order of an epoch's windows, int64 ``[W]``: seed and epoch decide, on any machine and version."""
        if self._order is None or self._order[0] != epoch:
            numbers = np.stack([np.full(len(self), epoch), np.arange(len(self))], axis=1)
            high, low = ranks(self.seed, numbers).T
            self._order = epoch, np.lexsort((low, high))
        return self._order[1]

    @property
    def longest(self) -> int:
        """Index of a window of greatest length: run it first, and memory that fails late fails at once."""
        return int(self.window_lengths.argmax())


def pack(
    tokenized: Sequence[TokenizedDocument],
    *,
    context: int,
    eos_token_id: int | None,
    split: bool = True,
    long_chat: str = "error",
    pad_token_id: int | None = None,
    alone: bool = False,
    seed: int = 0,
) -> PackedDataset:
    """Lay documents into windows of at most `context` tokens.

    The end token is appended once to each text that does not end with it already. Pieces without a target (a single
    token, or a part of a chat that holds only prompt) teach nothing and are left out; `Ledger` counts them.

    Args:
        tokenized: from `tokenize_documents`.
        context: most tokens in a window; at least 2.
        eos_token_id: the end token; None appends none.
        split: split texts longer than the context; False makes them an error.
        long_chat: what becomes of chats longer than the context: "error", "split", "truncate_left" (keep the end),
            "truncate_right" (keep the beginning) or "drop". A policy that loses answers is the user's to choose.
        pad_token_id: fill every window up to `context` with it, so that windows stack; None leaves windows as long as
            they are.
        alone: give each piece a window of its own, for models in which packed documents see each other.
        seed: order of equally long pieces, and of the windows in each epoch.
    Raises:
        ConfigError: context below 2, an unknown policy.
        DataError: documents that are too long under the policies given, with counts; nothing left to train on.
    """
    if context < 2:
        raise ConfigError(f"context {context}: must be at least 2 tokens, one to read and one to predict")
    if long_chat not in LONG_CHAT:
        raise ConfigError(f"data.long_chat {long_chat!r}: allowed are {', '.join(LONG_CHAT)}")
    table = table_of(tokenized)
    lengths = table.lengths(eos_token_id=eos_token_id)
    _check_lengths(tokenized, table, lengths, context=context, split=split, long_chat=long_chat)
    runs = _runs(lengths, table.is_chat, context, long_chat)
    targets, _ = count_targets(tokenized, table, *runs.T)
    runs = runs[targets > 0]
    if not len(runs):
        raise DataError(f"{len(tokenized):,} documents, but no token to train on is left at context {context:,}")
    if alone:
        bounds = np.arange(len(runs) + 1)
    else:
        order, bounds = best_fit_decreasing(runs[:, 2] - runs[:, 1], context, ties=ranks(seed, runs))
        runs = runs[order]
    pieces = Pieces(*(np.ascontiguousarray(column) for column in runs.T))
    return PackedDataset(
        tokenized, table, pieces, bounds, context=context, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
        seed=seed,
    )  # fmt: skip


def _check_lengths(
    tokenized: Sequence[TokenizedDocument],
    table: DocumentTable,
    lengths: np.ndarray,
    *,
    context: int,
    split: bool,
    long_chat: str,
) -> None:
    for kind, chats, refused in (("texts", False, not split), ("chats", True, long_chat == "error")):
        is_kind = table.is_chat == chats
        long = np.flatnonzero((lengths > context) & is_kind)
        if not refused or not len(long):
            continue
        longest = int(long[lengths[long].argmax()])
        total, excess = int(lengths[long].sum()), int((lengths[long] - context).sum())
        choice = (
            f"choose data.long_chat: split (nothing lost, but later parts do not see earlier ones), truncate_left or "
            f"truncate_right (cuts {excess:,} tokens; truncate_right cuts the ends of answers), "
            f"or drop (loses {total:,} tokens)"
            if chats
            else "allow split"
        )
        raise DataError(
            f"{len(long):,} of {int(is_kind.sum()):,} {kind} are longer than context {context:,}; "
            f"the longest, {tokenized[longest].name}, has {int(lengths[longest]):,} tokens. "
            f"Set context to that, or {choice}"
        )


def _runs(lengths: np.ndarray, is_chat: np.ndarray, context: int, long_chat: str) -> np.ndarray:
    """Cut documents into runs of at most `context` tokens: (document, start, stop), int64 ``[R, 3]``, in order."""
    count = np.maximum(-(-lengths // context), 1)  # of runs that a document is split into; an empty one is one
    is_cut = is_chat & (lengths > context) & (long_chat in ("drop", "truncate_left", "truncate_right"))
    count[is_cut] = 0 if long_chat == "drop" else 1
    document = np.repeat(np.arange(len(lengths)), count)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    start = nth * context
    if long_chat == "truncate_left":
        start = np.where(is_cut[document], lengths[document] - context, start)
    return np.stack([document, start, np.minimum(start + context, lengths[document])], axis=1)
