"""Documents become tokens: texts as they are, chats through their template, each with what a user should know of it.

What this is not: it lays nothing into windows (`packing.py`), and how a chat becomes tokens is said in `encoding.py`.
"""

import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np

from longfit.data.chat_notes import ChatNotes
from longfit.data.document import Document
from longfit.data.encoding import TRAIN_ON, encode_chat
from longfit.data.source_report import listing
from longfit.data.template import ChatTemplate, choose_template, control_pattern
from longfit.data.template import control_tokens as control_texts
from longfit.data.turn_end import TurnEnd, find_turn_end
from longfit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPELT = (
    "documents spell out control tokens; they are tokenised as text (data.control_tokens=control takes them for the "
    "model's own)"
)
DECOMPOSED_CHARS = 1 << 18  # of decomposed Unicode: enough to measure what it costs
TOKENIZE_CHARS = (
    4 << 20
)  # texts are tokenised together up to this size: enough for every core, little beside the result


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedDocument:
    """One document as tokens.

    Plain text has no `trained` mask (every token is a target) and gets an end token when packed; a chat has both its
    mask and, from its template, its end tokens.
    """

    name: str
    input_ids: np.ndarray  # int32 [N]
    trained: np.ndarray | None = None  # bool [N]
    num_special: int = 0  # special tokens that were spelled out in the text itself

    @property
    def is_chat(self) -> bool:
        """Whether only some of the tokens are targets."""
        return self.trained is not None


@dataclass(slots=True)
class TokenizedSet(Sequence[TokenizedDocument]):
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
    turn_end: TurnEnd | None = None
    done = 0
    for batch in _batches(documents):
        chat = batch[0].chat
        if chat is None:
            tokenized.extend(_tokenize_texts(batch, tokenizer, control_tokens, result.notes))
        else:
            if result.template is None:
                stops = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(stop_ids)) if token]
                result.template = choose_template(tokenizer, template, date=date, stops=stops)
                turn_end = find_turn_end(result.template, stops=stops)
            notes = ChatNotes()
            try:
                encoded = encode_chat(
                    chat,
                    tokenizer,
                    template=result.template,
                    turn_end=turn_end,
                    train_on=train_on,
                    template_drops=template_drops,
                    notes=notes,
                )
            except DataError as error:
                problems.append(f"{batch[0].name}: {error}")
            else:
                result.notes.update(notes)
                tokenized.extend(TokenizedDocument(batch[0].name, row.input_ids, row.trained) for row in encoded)
        for document in batch:
            _count_decomposed(document, tokenizer, result.notes)
        done += len(batch)
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


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield texts together, up to a size, and chats alone, in order."""
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        if batch and (document.is_chat or num_chars >= TOKENIZE_CHARS):
            yield batch
            batch, num_chars = [], 0
        if document.is_chat:
            yield [document]
        else:
            batch.append(document)
            num_chars += document.num_chars()
    if batch:
        yield batch


def _tokenize_texts(
    batch: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", control_tokens: str, notes: ChatNotes
) -> list[TokenizedDocument]:
    """Tokenise texts together; those that spell out control tokens again, as text if they are to be text."""
    control = control_pattern(tokenizer)
    spells = [bool(control and control.search(document.text or "")) for document in batch]
    arrays = _input_ids([document.text for document in batch], tokenizer)
    if control_tokens == "text" and any(spells):
        spelling = [index for index, is_spelt in enumerate(spells) if is_spelt]
        again = _input_ids([batch[index].text for index in spelling], tokenizer, split_special_tokens=True)
        for index, ids in zip(spelling, again, strict=True):
            arrays[index] = ids
    special = np.asarray(tokenizer.convert_tokens_to_ids(sorted(control_texts(tokenizer))), dtype=np.int32)
    made = []
    for document, ids, is_spelt in zip(batch, arrays, spells, strict=True):
        inner = ids[1:-1]  # the ends may be the tokenizer's BOS and EOS
        # Characters that the vocabulary lacks become its unknown token, which nobody spelled out.
        count = int((np.isin(inner, special) & (inner != tokenizer.unk_token_id)).sum()) if is_spelt else 0
        if is_spelt and not count:
            notes.counts[SPELT] += 1
        made.append(TokenizedDocument(document.name, ids, num_special=count))
    return made


def _input_ids(texts: Sequence[Any], tokenizer: "PreTrainedTokenizerBase", **options: bool) -> list[np.ndarray]:
    encoded = tokenizer(list(texts), verbose=False, **options)["input_ids"]
    return [np.asarray(ids, dtype=np.int32) for ids in encoded]


def _count_decomposed(document: Document, tokenizer: "PreTrainedTokenizerBase", notes: ChatNotes) -> None:
    """Count the tokens of decomposed Unicode as it is and composed, of enough of it to tell what it costs."""
    for text in document.texts():
        if not text.isascii() and notes.decomposed["characters"] < DECOMPOSED_CHARS:
            part = text[:DECOMPOSED_CHARS]
            composed = unicodedata.normalize("NFC", part)
            if composed != part:
                before, after = _input_ids([part, composed], tokenizer, add_special_tokens=False)
                notes.decomposed.update({"characters": len(part), "as it is": len(before), "composed": len(after)})


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
