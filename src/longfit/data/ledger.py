"""The token ledger: every token of the set, and what becomes of it. Nothing is cut or dropped without a number here.

    in a window     trained     a target: the model learns to predict it
                    masked      a prompt: seen, not learned
                    starts      the first token of a document: nothing before it to predict it from
                    boundaries  the first token of a later piece: it lost what predicts it where its document was split
    in no window    cut         of documents that are otherwise trained on
                    dropped     of documents that are not trained on at all

These six add up to the tokens of the set, always; `padded` tokens come on top and belong to no document. The ledger is
counted from the packed pieces themselves, not from what the packing meant to do.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from longfit.data.document_table import count_targets
from longfit.data.packing import PackedDataset
from longfit.data.source_report import SourceReport
from longfit.data.tokenized import TokenizedDocument
from longfit.data.tokenizing import TokenizedSet, note_lines, unread_lines
from longfit.errors import DataError
from longfit.numerics.labels import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_SHOWN = 20
FEW_LONG_DOCUMENTS = 20  # below this many documents beyond the native window there is little to learn long context from
MUCH_PADDING = 0.1  # share of the windows' places that hold nothing


@dataclass(frozen=True, slots=True)
class Span:
    """A run of a sample's text that is trained throughout, or not at all."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Ledger:
    """What becomes of every token; made by `Ledger.of`, stored with a run as ``ledger.json``."""

    # tokens
    total_tokens: int
    trained_tokens: int
    masked_tokens: int
    start_tokens: int
    boundary_tokens: int
    cut_tokens: int
    dropped_tokens: int
    padded_tokens: int
    # documents
    num_documents: int
    num_chats: int
    num_split: int
    num_cut: int
    num_dropped: int
    num_duplicates: int
    num_empty: int
    num_skipped_files: int
    num_with_special_tokens: int
    num_answers_without_end: int
    # lengths, in tokens with the end token
    length_p50: int
    length_p90: int
    length_p99: int
    length_max: int
    context: int
    native_context: int | None
    num_longer_than_context: int
    num_longer_than_native: int | None
    # windows
    num_windows: int
    slack_tokens: int  # places of the windows that no document fills, padded or not
    # what rows say and nothing reads: counts by column, and by key of a message
    unread_columns: dict[str, int] = field(default_factory=dict)
    unread_keys: dict[str, int] = field(default_factory=dict)
    num_bad_rows: int = 0  # left out, as data.bad_rows allowed
    num_decomposed_words: int = 0
    num_validation_seen: int = 0  # documents that are validated on and trained on as well
    # lengths once more: (at most so many tokens, documents), powers of two; (name, tokens) of the longest
    histogram: tuple[tuple[int, int], ...] = ()
    longest: tuple[tuple[str, int], ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # how the data were read, where that is a choice
    sample: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        parts = self.trained_tokens + self.masked_tokens + self.start_tokens + self.boundary_tokens + self.unused_tokens
        if parts != self.total_tokens or min(self.padded_tokens, self.slack_tokens, self.unused_tokens) < 0:
            raise DataError(
                f"the ledger does not add up: {parts:,} tokens accounted for, {self.total_tokens:,} in the set"
            )

    @property
    def unused_tokens(self) -> int:
        """Tokens that are in no window."""
        return self.cut_tokens + self.dropped_tokens

    @classmethod
    def of(
        cls,
        packed: PackedDataset,
        *,
        native_context: int | None = None,
        report: SourceReport | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        num_validation_seen: int = 0,
    ) -> "Ledger":
        """Count a packed set.

        Args:
            packed: from `pack`.
            native_context: tokens the base model was made for; None if unknown.
            report: of the documents, for what was skipped before there were tokens.
            tokenizer: to put a readable sample into the ledger.
            num_validation_seen: documents that are held out and trained on as well.
        """
        documents, table, pieces = packed.documents, packed.table, packed.pieces
        lengths = table.lengths(eos_token_id=packed.eos_token_id)
        kept = np.bincount(pieces.document, weights=pieces.lengths, minlength=len(documents)).astype(np.int64)
        num_pieces = np.bincount(pieces.document, minlength=len(documents))
        is_target, first_is_target = count_targets(documents, table, pieces.document, pieces.start, pieces.stop)
        begins = pieces.start == 0
        num_trained = int(is_target.sum())
        num_starts, num_boundaries = int((first_is_target & begins).sum()), int((first_is_target & ~begins).sum())
        slack = len(packed) * packed.context - int(kept.sum())
        numbers: dict[str, Any] = {
            "total_tokens": int(lengths.sum()),
            "trained_tokens": num_trained,
            "masked_tokens": int(kept.sum()) - num_trained - num_starts - num_boundaries,
            "start_tokens": num_starts,
            "boundary_tokens": num_boundaries,
            "cut_tokens": int((lengths - kept)[num_pieces > 0].sum()),
            "dropped_tokens": int(lengths[num_pieces == 0].sum()),
            "padded_tokens": slack if packed.pad_token_id is not None else 0,
            "num_documents": len(documents),
            "num_chats": int(table.is_chat.sum()),
            "num_split": int((num_pieces > 1).sum()),
            "num_cut": int(((lengths > kept) & (num_pieces > 0)).sum()),
            "num_dropped": int((num_pieces == 0).sum()),
            "num_duplicates": len(report.duplicates) if report else 0,
            "num_empty": len(report.empty) if report else 0,
            "num_skipped_files": len(report.skipped) if report else 0,
            "num_with_special_tokens": int((table.num_special > 0).sum()),
            "num_answers_without_end": _answers_without_end(packed),
            **{f"length_p{q}": _percentile(lengths, q) for q in (50, 90, 99)},
            "length_max": int(lengths.max()),
            "context": packed.context,
            "native_context": native_context,
            "num_longer_than_context": int((lengths > packed.context).sum()),
            "num_longer_than_native": None if native_context is None else int((lengths > native_context).sum()),
            "num_validation_seen": num_validation_seen,
            "histogram": _histogram(lengths),
            "longest": _longest(documents, lengths),
            "num_windows": len(packed),
            "slack_tokens": slack,
        }
        sample = sample_spans(packed, tokenizer) if tokenizer is not None else ()
        extra = _extra_tokens(documents)
        lines = (report.warnings(extra_tokens=extra) if report else []) + _warnings(numbers)
        notes = report.notes() if report else []
        if report is not None:
            numbers["unread_columns"] = dict(report.unread)
            numbers["num_bad_rows"] = len(report.bad_rows)
            numbers["num_decomposed_words"] = report.num_decomposed
        if isinstance(documents, TokenizedSet):
            found = documents.notes
            numbers["unread_keys"] = dict(found.unread)
            numbers["num_bad_rows"] = numbers.get("num_bad_rows", 0) + len(documents.skipped)
            lines += unread_lines(found, documents.skipped)
            notes += note_lines(found)
        return cls(**numbers, warnings=tuple(lines), notes=tuple(notes), sample=sample)

    def to_json(self) -> str:
        """Write the ledger as the text of ``ledger.json``."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Ledger":
        """Read a ledger back.

        Raises: DataError: not JSON, keys missing or unknown, or sums that do not add up.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"ledger: bad JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            wrong = sorted(set(values) ^ names) if isinstance(values, dict) else type(values).__name__
            raise DataError(f"ledger: missing or unknown keys: {wrong}; was it written by another version?")
        values["warnings"], values["notes"] = tuple(values["warnings"]), tuple(values["notes"])
        for name in ("histogram", "longest"):
            values[name] = tuple(tuple(pair) for pair in values[name])
        values["sample"] = tuple(Span(**span) for span in values["sample"])
        return cls(**values)

    def lengths_view(self) -> list[str]:
        """Show how long the documents are: a bar for each power of two, and the longest by name."""
        most = max((count for _, count in self.histogram), default=1)
        lines = ["documents by length in tokens:"]
        for bound, count in self.histogram:
            bar = "█" * max(1, round(40 * count / most)) if count else ""
            beyond = "  longer than the context" if bound // 2 >= self.context else ""
            lines.append(f"  up to {bound:>11,} {count:>11,} {bar}{beyond}")
        lines.append(f"the {len(self.longest)} longest:")
        return lines + [f"  {tokens:>13,}  {name}" for name, tokens in self.longest]

    def summary(self) -> list[str]:
        """Say it in plain lines, warnings last, each beginning with ``warning:``."""
        kinds = [
            ("trained", self.trained_tokens),
            ("masked (prompts)", self.masked_tokens),
            ("first tokens of documents", self.start_tokens),
            ("first tokens after a split", self.boundary_tokens),
            ("cut", self.cut_tokens),
            ("dropped", self.dropped_tokens),
        ]
        lines = [
            f"{self.num_documents:,} documents, {self.total_tokens:,} tokens, "
            f"{self.num_windows:,} windows of at most {self.context:,}"
        ]
        lines += [
            f"  {name:<27}{count:>15,}  {count / self.total_tokens:6.1%}"
            for name, count in kinds
            if count or name == "trained"
        ]
        if self.padded_tokens:
            lines.append(f"  {'padding, on top':<27}{self.padded_tokens:>15,}")
        lines.append(
            f"document lengths in tokens: p50 {self.length_p50:,}  p90 {self.length_p90:,}  "
            f"p99 {self.length_p99:,}  max {self.length_max:,}"
        )
        native = (
            ""
            if self.native_context is None
            else f", {self.num_longer_than_native:,} beyond the native {self.native_context:,}"
        )
        lines.append(f"{self.num_longer_than_context:,} documents are longer than the context{native}")
        lines += [f"note: {line}" for line in self.notes]
        return lines + [f"warning: {line}" for line in self.warnings]


def sample_spans(
    packed: PackedDataset, tokenizer: "PreTrainedTokenizerBase", *, index: int = 0, max_tokens: int = 400
) -> tuple[Span, ...]:
    """Decode the beginning of a window, cut where training begins and ends.

    Args:
        index: which window.
        max_tokens: how much of it; a chat's long prompt is cut in its middle, so that the answer shows.
    """
    window = packed[index]
    ids, trained = window["input_ids"].numpy(), window["labels"].numpy() != IGNORED
    used = int(packed.window_lengths[index])
    edges = [0, *(np.flatnonzero(np.diff(trained[:used])) + 1).tolist(), used]
    spans: list[Span] = []
    left = max_tokens
    for start, stop in pairwise(edges):
        share = min(stop - start, left if trained[start] else max(1, left // 2))
        if share <= 0:
            break
        if share == stop - start:
            text = tokenizer.decode(ids[start:stop].tolist())
        else:
            head = share // 2
            omitted = f" [... {stop - start - share:,} tokens ...] "
            tail = tokenizer.decode(ids[stop - (share - head) : stop].tolist())
            text = tokenizer.decode(ids[start : start + head].tolist()) + omitted + tail
        spans.append(Span(text, bool(trained[start])))
        left -= share
    return tuple(spans)


def _histogram(lengths: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Count lengths by the power of two that they do not exceed, from the shortest to the longest."""
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = np.bincount(powers)
    return tuple((1 << power, int(counts[power])) for power in range(int(powers.min()), len(counts)))


def _longest(documents: Sequence[TokenizedDocument], lengths: np.ndarray) -> tuple[tuple[str, int], ...]:
    order = np.argsort(-lengths, kind="stable")[:LONGEST_SHOWN]
    return tuple((documents[int(index)].name, int(lengths[index])) for index in order)


def _percentile(lengths: np.ndarray, percent: int) -> int:
    """Nearest rank: the shortest length that at least `percent` of the documents do not exceed."""
    return int(np.percentile(lengths, percent, method="inverted_cdf"))


def _extra_tokens(documents: Sequence[TokenizedDocument]) -> float | None:
    """How many more tokens decomposed Unicode took than composed would, as a share."""
    counted = documents.notes.decomposed if isinstance(documents, TokenizedSet) else {}
    return counted["as it is"] / counted["composed"] - 1 if counted and counted["composed"] else None


def _answers_without_end(packed: PackedDataset) -> int:
    """Count chats whose last trained token is in no window although some of the chat is."""
    pieces, table = packed.pieces, packed.table
    last = np.zeros(len(table), dtype=np.int64)
    np.maximum.at(last, pieces.document, pieces.stop)
    count = 0
    for document in np.flatnonzero(table.is_chat & (last > 0) & (last < table.length)).tolist():
        trained = packed.documents[document].trained
        count += trained is not None and bool(trained[last[document] :].any())
    return count


def _warnings(numbers: dict[str, Any]) -> list[str]:
    """Findings about the tokens that a user should see before training; each carries its numbers."""
    lines = []
    context, native, longest = numbers["context"], numbers["native_context"], numbers["length_max"]
    if longest < context:
        lines.append(
            f"context {context:,} is longer than any document (the longest has {longest:,} tokens): "
            f"nothing teaches positions beyond {longest:,}; use longer documents, or context {longest:,}"
        )
    if native is not None and context > native and numbers["num_longer_than_native"] < FEW_LONG_DOCUMENTS:
        lines.append(
            f"only {numbers['num_longer_than_native']:,} of {numbers['num_documents']:,} documents are longer than the "
            f"model's native {native:,} tokens (fewer than {FEW_LONG_DOCUMENTS}): little to learn long context from"
        )
    places = numbers["num_windows"] * context
    if numbers["padded_tokens"] > MUCH_PADDING * places:
        lines.append(
            f"padding wastes {numbers['padded_tokens'] / places:.0%} of every step; a smaller context wastes less, and "
            "train.batch_size=1 with train.gradient_accumulation pads nothing"
        )
    if numbers["num_validation_seen"]:
        lines.append(
            f"{numbers['num_validation_seen']:,} validation documents are trained on too, so their loss says nothing; "
            "remove them, or hold out with data.validation_fraction"
        )
    if numbers["num_answers_without_end"]:
        lines.append(f"{numbers['num_answers_without_end']:,} answers lost their end: the model does not see them stop")
    keeping = f"context.context={longest} keeps them whole"
    if numbers["num_chats"]:
        keeping += ", data.long_chat=split in several windows"
    if numbers["num_cut"]:
        lines.append(f"{numbers['cut_tokens']:,} tokens of {numbers['num_cut']:,} documents are cut; {keeping}")
    if numbers["num_dropped"]:
        lines.append(
            f"{numbers['num_dropped']:,} documents ({numbers['dropped_tokens']:,} tokens) are dropped; {keeping}"
        )
    if numbers["num_with_special_tokens"]:
        lines.append(
            f"{numbers['num_with_special_tokens']:,} documents spell out control tokens in their text, and they are "
            "control to the model"
        )
    return lines
