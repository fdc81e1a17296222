"""Documents become tokens: texts as they are, chats through their template, each with what a user should know of it.

What this is not: it lays nothing into windows (`packing.py`), and how a chat becomes tokens is said in `encoding.py`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, overload

from longfit.data.chat_encoder import ChatEncoder
from longfit.data.chat_notes import ChatNotes
from longfit.data.chat_workers import map_in_order
from longfit.data.document import Document
from longfit.data.document_table import DocumentTable, TabledDocuments, table_of
from longfit.data.encoding import TRAIN_ON
from longfit.data.source_report import listing
from longfit.data.template import ChatTemplate
from longfit.data.text_encoder import TextEncoder
from longfit.data.tokenized import TokenizedDocument
from longfit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_CHARS_A_CORE, TEXT_BATCH_CHARS = 1 << 19, 4 << 20
"""Tokenised together, by threads: much work for a core, and at most so much, for each character takes 40 bytes."""
CHAT_BATCH_CHARS = 1 << 18  # sent to a process: much work beside what sending takes, little progress at once


@dataclass(slots=True)
class TokenizedSet(TabledDocuments):
    """Documents as tokens, in order, and what was noticed.

    Attributes:
        template: of the chats; None where there are none.
        notes: counts of what a user should know, keys of messages that nothing reads, tokens that end answers.
        skipped: rows that were left out, each with why, as the caller allowed.
    """

    documents: Sequence[TokenizedDocument]
    template: ChatTemplate | None = None
    notes: ChatNotes = field(default_factory=ChatNotes)
    skipped: list[str] = field(default_factory=list)

    @property
    def table(self) -> DocumentTable:
        return table_of(self.documents)

    def __len__(self) -> int:
        return len(self.documents)

    @overload
    def __getitem__(self, index: int) -> TokenizedDocument: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenizedDocument]: ...
    def __getitem__(self, index: Any) -> Any:
        return self.documents[index]


class Sink(Protocol):
    """Where tokenised documents go instead of into memory."""

    def __len__(self) -> int: ...
    def extend(self, documents: Iterable[TokenizedDocument]) -> None: ...
    def finish(self, result: TokenizedSet) -> Sequence[TokenizedDocument]: ...


def tokenize_documents(
    documents: Iterable[Document],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: str | None = None,
    train_on: str = "all",
    template_drops: str = "error",
    bad_rows: str = "stop",
    date: str | None = None,
    control_tokens: str = "text",
    stop_ids: Collection[int] = (),
    processes: int = 1,
    on_document: Callable[[int], None] | None = None,
    sink: "Sink | None" = None,
) -> TokenizedSet:
    """Turn documents into tokens, 4 bytes each, reading one batch of texts at a time.

    Text is given to the tokenizer as it is, so a model whose tokenizer begins texts with BOS gets it once per document.

    Args:
        documents: texts or chats.
        template: for chats: None for the tokenizer's own, "chatml", a file, or Jinja text.
        train_on: for chats: train on "all" answers, only the "last", or those "marked" by their rows.
        template_drops: for chats: what happens where the template does not show all that a row says: "error", "allow".
        bad_rows: "stop" at rows that cannot be tokenised, or "skip" them.
        date: for chats: the day that templates print, as 2026-01-31.
        control_tokens: what control tokens are that a text spells out: "text", or the model's own ("control").
        stop_ids: token ids at which the model's own settings stop generation.
        processes: in which chats are encoded; texts are tokenised by threads, so much at once that as many have work.
        on_document: called with the number of documents done, for progress.
        sink: collects the tokens elsewhere than in memory; then the documents of the result are its own.
    Returns: one entry a document, in order; several for a chat whose template rewrites turns.
    Raises:
        DataError: chats the template refuses or nothing of which is trained (the first, by place, and their number).
        ConfigError: chats without a template.
    """
    if train_on not in TRAIN_ON:
        raise ConfigError(f"data.train_on {train_on!r}: allowed are {', '.join(TRAIN_ON)}")
    in_memory: list[TokenizedDocument] = []
    tokenized = in_memory if sink is None else sink
    result = TokenizedSet(in_memory)
    problems: list[str] = []
    done = 0
    for is_chat, group in groupby(documents, key=lambda document: document.is_chat):
        if is_chat:
            encoder = ChatEncoder(
                tokenizer,
                template=template,
                train_on=train_on,
                template_drops=template_drops,
                date=date,
                stop_ids=stop_ids,
            )
            result.template = encoder.template
            batches = _batches(group, num_chars=CHAT_BATCH_CHARS)
            encoded = map_in_order(encoder, batches, processes=processes) if processes > 1 else map(encoder, batches)
        else:
            texts = TextEncoder(tokenizer, control_tokens=control_tokens)
            encoded = map(texts, _batches(group, num_chars=min(processes * TEXT_CHARS_A_CORE, TEXT_BATCH_CHARS)))
        for found in encoded:
            tokenized.extend(found.documents)
            problems += found.problems
            result.notes.update(found.notes)
            done += found.num_documents
            if on_document is not None:
                on_document(done)
    if problems and (bad_rows == "stop" or not len(tokenized)):
        raise DataError(bad_rows_text(problems, done))
    result.skipped = problems
    if sink is not None:
        result.documents = sink.finish(result)
    return result


def bad_rows_text(problems: Sequence[str], total: int) -> str:
    """Say which rows are bad, how many of them, and what can be done."""
    if len(problems) == 1 == total:
        return problems[0]
    advice = "correct them, or leave them out with data.bad_rows=skip"
    return f"{listing(problems, 'rows')}\n{len(problems):,} of {total:,} rows cannot be trained on; {advice}"


def _batches(documents: Iterable[Document], *, num_chars: int) -> Iterator[list[Document]]:
    """Yield documents together, up to a size, in order."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        if batch and size >= num_chars:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += document.num_chars()
    if batch:
        yield batch


def note_lines(notes: ChatNotes) -> list[str]:
    """Say how chats were read, a line a choice, with its count."""
    return [f"{count:,} {text}" for text, count in notes.counts.most_common()]


def unread_lines(notes: ChatNotes, skipped: Sequence[str]) -> list[str]:
    """Say what is in no token: keys of messages that the template does not read, rows that were skipped."""
    lines = []
    if notes.unread:
        named = ", ".join(f"{key} ({count:,})" for key, count in notes.unread.most_common())
        lines.append(f"keys of messages that the chat template does not read: {named}")
    if skipped:
        lines.append(f"{len(skipped):,} bad rows are skipped; the first: {skipped[0]}")
    return lines
