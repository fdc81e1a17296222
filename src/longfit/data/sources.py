"""A file, a folder or an archive becomes documents; what is not read is listed, what cannot be read is an error.

One text file is one document, one row of a table is one document. The path is walked once to check and fingerprint
everything, which keeps 28 bytes per document; iterating reads the text again, one document at a time. So a
folder larger than memory is never held, and every problem is known before the first token is made.

What this is not: it does not choose the files of a folder (`files.py`), it knows no tokens (`packing.py`), and it does
not decide what a row means (`layouts.py`).
"""

import io
import json
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np

from longfit.data import layouts, readers
from longfit.data.containers import DAMAGED, open_file, read_members
from longfit.data.documents import EXTRACTORS, Extraction, extract
from longfit.data.files import find_files
from longfit.data.html import read_html
from longfit.data.messages import Chat, Message
from longfit.errors import ConfigError, DataError

PROBLEMS_SHOWN = 10  # of possibly thousands: enough to see the pattern


@dataclass(frozen=True, slots=True)
class Document:
    """One unit that is trained on whole: a text, or a chat.

    `line` is where its row begins in `source` (the row's number in Parquet and Arrow files); None for a whole file.
    `unread` are the columns of its row that say something and that nothing reads.
    """

    name: str
    text: str | None = None
    chat: Chat | None = None
    source: str = ""
    line: int | None = None
    unread: tuple[str, ...] = ()
    extraction: Extraction | None = None

    @property
    def is_chat(self) -> bool:
        """Whether it holds turns rather than text."""
        return self.chat is not None

    @property
    def messages(self) -> tuple[Message, ...] | None:
        """The turns of a chat."""
        return None if self.chat is None else self.chat.messages

    def fingerprint(self) -> bytes:
        """Digest of the content: equal documents are duplicates.

        Raises: DataError: the text is not valid Unicode.
        """
        content = self.text
        if content is None:
            said = self.chat.said() if self.chat is not None else []
            content = json.dumps(said, sort_keys=True, ensure_ascii=False, default=str)
        try:
            return blake2b(content.encode(), digest_size=16).digest()
        except UnicodeEncodeError as error:  # JSON can say "\ud83d" alone; no tokenizer can read it
            half = ascii(content[error.start])
            raise DataError(f"{self.name}: half a character, {half}, at {error.start:,}; write the whole one") from None

    def texts(self) -> Iterator[str]:
        """The text, or what the turns say."""
        if self.text is not None:
            yield self.text
        for message in self.messages or ():
            yield message["content"]

    def num_chars(self) -> int:
        """Characters of text, or of all messages' contents."""
        return sum(map(len, self.texts()))


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What was found under a path: read, skipped, empty and repeated. Nothing is left out without a line here."""

    num_files: int
    num_bytes: int
    skipped: tuple[tuple[str, str], ...] = ()  # (file, why)
    empty: tuple[str, ...] = ()  # documents without text
    duplicates: tuple[str, ...] = ()  # documents equal to an earlier one; they are kept
    bad_rows: tuple[str, ...] = ()  # rows that were left out, each with why
    unread: tuple[tuple[str, int], ...] = ()  # columns that say something nobody reads, and in how many rows
    extractions: tuple[tuple[str, Extraction], ...] = ()  # of documents that are no plain text
    num_words: int = 0
    num_decomposed: int = 0  # words written with decomposed characters (NFD)

    def warnings(self) -> list[str]:
        """One line per kind of finding, with its number and first example."""
        lines = []
        if self.skipped:
            reasons = Counter(reason for _, reason in self.skipped)
            counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
            lines.append(f"{len(self.skipped):,} files not read ({counts}); the first: {self.skipped[0][0]}")
        if self.bad_rows:
            lines.append(f"{len(self.bad_rows):,} bad rows are skipped; the first: {self.bad_rows[0]}")
        if self.unread:
            named = ", ".join(f"{column} ({count:,})" for column, count in self.unread)
            lines.append(f"columns that nothing reads: {named}")
        for name, extraction in self.extractions:
            if extraction.empty:
                shown = ", ".join(map(str, extraction.empty[:10])) + ", ..." * (len(extraction.empty) > 10)
                lines.append(
                    f"{name}: {len(extraction.empty):,} of {extraction.num_units:,} {extraction.unit} hold no text "
                    f"({shown}); a scanned page is a picture, and is not read"
                )
        if self.num_decomposed:
            lines.append(
                f"{self.num_decomposed:,} of {self.num_words:,} words are decomposed Unicode (NFD), which costs more "
                "tokens; set data.normalise=nfc"
            )
        if self.empty:
            lines.append(f"{len(self.empty):,} empty documents left out; the first: {self.empty[0]}")
        if self.duplicates:
            lines.append(
                f"{len(self.duplicates):,} documents repeat an earlier one and are trained on again; "
                f"the first: {self.duplicates[0]}"
            )
        return lines

    def notes(self) -> list[str]:
        """What was taken out of documents that are no plain text, a line for each kind."""
        by_unit: dict[str, list[Extraction]] = {}
        for _, extraction in self.extractions:
            by_unit.setdefault(extraction.unit, []).append(extraction)
        return [
            f"extracted {sum(found.num_chars for found in each):,} characters from {sum(e.num_units for e in each):,} "
            f"{unit} of {len(each):,} files, {sum(len(e.empty) for e in each):,} {unit} without text"
            for unit, each in by_unit.items()
        ]


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read, whatever they are: the settings of `read_documents`."""

    encoding: str | None = None
    text_column: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    normalise: str = "none"
    bad_rows: str = "stop"


class Source(Protocol):
    """Where documents come from; reading twice gives the same documents in the same order.

    Rows that hold nothing usable are added to `problems`, each with its place.
    """

    def read(self, problems: list[str]) -> Iterator[Document]: ...


@dataclass(frozen=True, slots=True)
class MemorySource:
    """Documents that are already in memory."""

    documents: tuple[Document, ...]

    def read(self, problems: list[str]) -> Iterator[Document]:
        return iter(self.documents)


@dataclass(frozen=True, slots=True)
class FileSource:
    """One file on disk, or one archive with those of its members that are read."""

    path: Path
    name: str  # relative to what the user named, as printed
    kind: str  # a value of `files.KIND_OF_SUFFIX`, or "archive"
    members: tuple[tuple[str, str], ...] = ()
    reading: Reading = Reading()

    def read(self, problems: list[str]) -> Iterator[Document]:
        """Yield the documents; an archive is unpacked once."""
        if self.kind != "archive":
            yield from self._guarded(self.name, str(self.path), self.kind, lambda: open_file(self.path), problems)
            return
        kinds = dict(self.members)
        try:
            for member, stream in read_members(self.path, frozenset(kinds)):
                name, source = f"{self.name}!/{member}", f"{self.path}!/{member}"
                yield from self._guarded(name, source, kinds[member], lambda: nullcontext(stream), problems)  # noqa: B023 (called at once)
        except DAMAGED as error:
            problems.append(f"{self.name}: cannot be read: {error}")

    def _guarded(
        self,
        name: str,
        source: str,
        kind: str,
        opened: Callable[[], AbstractContextManager[BinaryIO]],
        problems: list[str],
    ) -> Iterator[Document]:
        """Read one file; what is wrong with all of it is a problem like that of a row."""
        try:
            with opened() as stream:
                yield from self._documents(name, source, kind, stream, problems)
        except DataError as error:
            problems += [f"{name}: {problem}" for problem in str(error).splitlines()]
        except DAMAGED as error:
            problems.append(f"{name}: cannot be read: {error}")

    def _documents(
        self, name: str, source: str, kind: str, stream: BinaryIO, problems: list[str]
    ) -> Iterator[Document]:
        encoding, nfc = self.reading.encoding, self.reading.normalise == "nfc"
        if kind in EXTRACTORS:
            text, extraction = extract(kind, stream)
            yield Document(name, text=_composed(text, nfc), source=source, extraction=extraction)
            return
        if kind in ("text", "html"):
            read = readers.read_text if kind == "text" else read_html
            yield Document(name, text=_composed(read(stream, encoding=encoding), nfc), source=source)
            return
        for line, content in self._contents(name, kind, stream, problems):
            said = None if content.text is None else _composed(content.text, nfc)
            chat = content.chat if content.chat is None or not nfc else Chat(*_composed_values(content.chat))
            yield Document(f"{name}:{line}", text=said, chat=chat, source=source, line=line, unread=content.unread)

    def _contents(
        self, name: str, kind: str, stream: BinaryIO, problems: list[str]
    ) -> Iterator[tuple[int, layouts.Content]]:
        """Yield what each row holds; rows that hold nothing usable are added to `problems`."""
        reading, first = self.reading, None
        columns = dict(reading.columns)
        for line, row in self._rows(kind, stream):
            try:
                if isinstance(row, DataError):
                    problems.append(f"{name}: {row}")
                    continue
                layout = layouts.recognise(row, text_column=reading.text_column, columns=columns)
                first = first or (line, layout)
                if layout.name != first[1].name:
                    raise DataError(
                        f"mixed rows: {layout.name} here, but {first[1].name} at line {first[0]}; "
                        "put them into separate files, or name one column with data.text_column"
                    )
                yield line, layouts.read_row(row, layout)
            except DataError as error:
                problems.append(f"{name}: line {line}: {error}")

    def _rows(self, kind: str, stream: BinaryIO) -> Iterator[readers.NumberedRow]:
        encoding = self.reading.encoding
        if kind == "jsonl":
            return readers.read_jsonl(stream, encoding=encoding)
        if kind == "json":
            return readers.read_json(stream, encoding=encoding)
        if kind in ("csv", "tsv"):
            return readers.read_csv(stream, encoding=encoding, delimiter=None if kind == "csv" else "\t")
        return readers.read_parquet(_seekable(stream)) if kind == "parquet" else readers.read_arrow(stream)


def _seekable(stream: BinaryIO) -> BinaryIO:
    """Parquet is read from its end; what cannot be sought in is unpacked into memory."""
    return stream if isinstance(stream, io.BufferedReader) and stream.seekable() else io.BytesIO(stream.read())


def _composed(text: str, wanted: bool) -> str:
    return unicodedata.normalize("NFC", text) if wanted else text


def _composed_values(chat: Chat) -> tuple[Any, Any, Any]:
    def composed(value: Any) -> Any:
        if isinstance(value, str):
            return unicodedata.normalize("NFC", value)
        if isinstance(value, dict):
            return {composed(key): composed(item) for key, item in value.items()}
        return type(value)(composed(item) for item in value) if isinstance(value, list | tuple) else value

    return composed(chat.messages), composed(chat.tools), chat.flags


@dataclass(frozen=True, slots=True)
class Documents:
    """A set of documents that is read when it is iterated, not before. Iterate it as often as needed.

    Made by `read_documents`, or by `Documents.of` from documents in memory. What is kept of each document is where it
    is and what identifies it, 28 bytes: a set larger than memory is described in little of it.
    """

    sources: tuple[Source, ...]
    source: np.ndarray  # int32 [N], index into `sources`
    position: np.ndarray  # int64 [N], among the documents of its source
    digests: np.ndarray  # uint8 [N, 16]
    report: SourceReport
    is_chat: bool = False  # whether they are chats, or all texts

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "Documents":
        """Wrap documents that are in memory."""
        return _survey([MemorySource(tuple(documents))], num_bytes=0, skipped=())

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents in order, reading each source once.

        Raises: DataError: a file changed since it was surveyed.
        """
        edges = np.flatnonzero(np.diff(self.source, prepend=-1, append=-1))
        for start, stop in pairwise(edges.tolist()):
            source = self.sources[self.source[start]]
            found = start
            for position, document in enumerate(source.read([])):
                if position == self.position[found]:
                    if document.fingerprint() != self.digests[found].tobytes():
                        raise DataError(f"{document.name}: changed while it was being read; start again")
                    found += 1
                    yield document
                    if found == stop:
                        break
            if found != stop:
                raise DataError(
                    f"{stop - found:,} documents vanished from {source} while it was being read; start again"
                )

    def select(self, indices: Iterable[int]) -> "Documents":
        """Keep some of the documents, in their present order."""
        kept = np.asarray(sorted(set(indices)), dtype=np.int64)
        return replace(self, source=self.source[kept], position=self.position[kept], digests=self.digests[kept])

    @property
    def fingerprints(self) -> list[bytes]:
        """The content digest of each document, in order."""
        return [digest.tobytes() for digest in self.digests]

    def digest(self) -> str:
        """One digest of all contents in their order, in hexadecimal."""
        return blake2b(np.ascontiguousarray(self.digests).tobytes(), digest_size=16).hexdigest()


def read_documents(
    path: str | Path,
    *,
    text_column: str | None = None,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
    exclude: Sequence[str] = (),
    normalise: str = "none",
    bad_rows: str = "stop",
) -> Documents:
    """Find and check every document under a path.

    Folders are walked recursively, in sorted order; hidden files, unknown extensions, symbolic links to folders and
    archives inside archives are not read, and listed in `Documents.report`. A file named directly is read as text
    whatever its extension.

    Args:
        path: a text, a document, a table (.jsonl .json .csv .tsv .parquet .arrow), an archive, or a folder of them.
        text_column: the column of tables that holds plain text; None recognises it by name (see `layouts.py`).
        columns: a map from our names (`layouts.MAPPED`) to the table's columns.
        encoding: of text files and tables, if not UTF-8.
        exclude: glob patterns, matched against the path relative to `path` and each of its parts.
        normalise: "nfc" composes decomposed Unicode, "none" leaves it.
        bad_rows: "stop" at rows and files that cannot be used, "skip" them and list them in the report.
    Raises:
        DataError: as :func:`find_files`, or damaged files: all of them in one message, each with its place.
        ConfigError: unknown encoding or column name.
    """
    path = Path(path)
    found, skipped = find_files(path, exclude)
    reading = Reading(encoding, text_column, tuple((columns or {}).items()), normalise, bad_rows)
    files = [FileSource(*file, reading) for file in found]
    num_bytes = sum(file.stat().st_size for file in {source.path for source in files})
    return _survey(files, num_bytes=num_bytes, skipped=tuple(skipped), path=path, bad_rows=bad_rows)


def split_documents(
    documents: Documents,
    *,
    validation_fraction: float | None = None,
    validation_count: int | None = None,
    seed: int = 0,
) -> tuple[Documents, Documents]:
    """Hold documents back for validation: whole documents, and never one whose twin is trained on.

    A document's side depends on the seed and its content only, so adding or renaming files moves few documents across.

    Args:
        validation_fraction: share of the documents, in [0, 1); at least one document if above 0.
        validation_count: how many documents; give one of the two.
        seed: another choice of documents.
    Returns: (training, validation); duplicates may make validation smaller than asked, never larger.
    Raises:
        ConfigError: both or neither given, or a number out of range.
        DataError: too few different documents to leave one on each side.
    """
    if (validation_fraction is None) == (validation_count is None):
        raise ConfigError("give either validation_fraction or validation_count")
    total = len(documents)
    if validation_fraction is not None:
        if not 0 <= validation_fraction < 1:
            raise ConfigError(
                f"data.validation_fraction {validation_fraction}: must be at least 0 and below 1; try 0.05"
            )
        count = max(1, round(validation_fraction * total)) if validation_fraction else 0
    else:
        count = cast(int, validation_count)
        if count < 0:
            raise ConfigError(f"validation_count {count}: must be at least 0")
    twins: dict[bytes, list[int]] = {}
    for index, fingerprint in enumerate(documents.fingerprints):
        twins.setdefault(fingerprint, []).append(index)
    key = seed.to_bytes(16, "little", signed=True)
    held: list[int] = []
    for fingerprint in sorted(twins, key=lambda digest: blake2b(digest, key=key).digest()):
        if len(held) + len(twins[fingerprint]) <= count and len(held) + len(twins[fingerprint]) < total:
            held += twins[fingerprint]
    if (count and not held) or count >= total > 0:
        raise DataError(
            f"{total:,} documents ({len(twins):,} different) cannot give {count:,} to validation and keep one for "
            "training; ask for fewer, or point validation at another file"
        )
    return documents.select(set(range(total)) - set(held)), documents.select(held)


def _survey(
    sources: Sequence[Source],
    *,
    num_bytes: int,
    skipped: tuple[tuple[str, str], ...],
    path: Path | None = None,
    bad_rows: str = "stop",
) -> Documents:
    """Read every source once: collect problems, drop empty documents, fingerprint the others."""
    places: tuple[array[int], array[int]] = array("i"), array("q")
    digests = bytearray()
    problems: list[str] = []
    empty: list[str] = []
    duplicates: list[str] = []
    extractions: list[tuple[str, Extraction]] = []
    unread: Counter[str] = Counter()
    num_words = num_decomposed = 0
    seen: set[bytes] = set()
    kinds: dict[bool, str] = {}  # is_chat -> the first such document
    for index, source in enumerate(sources):
        for position, document in enumerate(source.read(problems)):
            unread.update(document.unread)
            if document.extraction is not None:
                extractions.append((document.name, document.extraction))
            if document.text is not None and not document.text.strip():
                empty.append(document.name)
                continue
            try:
                fingerprint = document.fingerprint()
            except DataError as error:
                problems.append(str(error))
                continue
            if fingerprint[:8] in seen:  # 64 bits: two of a million documents are taken for equal once in 37 million
                duplicates.append(document.name)
            seen.add(fingerprint[:8])
            for text in document.texts():
                if not text.isascii() and not unicodedata.is_normalized("NFC", text):
                    words = text.split()
                    num_words += len(words)
                    num_decomposed += sum(not unicodedata.is_normalized("NFC", word) for word in words)
            kinds.setdefault(document.is_chat, document.name)
            places[0].append(index)
            places[1].append(position)
            digests += fingerprint
    count = len(places[0])
    if problems and (bad_rows == "stop" or not count):
        raise DataError(_told(problems, count))
    if len(kinds) == 2:
        raise DataError(
            f"chats ({kinds[True]}) and plain text ({kinds[False]}) are mixed; "
            "train on one kind, leave the other out with data.exclude"
        )
    if not count:
        raise DataError(f"{path or 'the documents'}: {len(empty):,} documents, all empty; nothing to train on")
    report = SourceReport(
        len(sources), num_bytes, skipped, tuple(empty), tuple(duplicates), tuple(problems), tuple(unread.most_common()),
        tuple(extractions), num_words, num_decomposed,
    )  # fmt: skip
    return Documents(
        tuple(sources),
        np.asarray(places[0], dtype=np.int32),
        np.asarray(places[1], dtype=np.int64),
        np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, 16),
        report,
        is_chat=True in kinds,
    )


def _told(problems: Sequence[str], num_good: int) -> str:
    """Show the first problems; of many rows, also how many they are and what can be done."""
    text = listing(problems, "problems")
    if num_good + len(problems) == 1 or not num_good:
        return text
    total = num_good + len(problems)
    return (
        f"{text}\n{len(problems):,} of {total:,} rows or files cannot be used; "
        "correct them, or leave them out with data.bad_rows=skip"
    )


def listing(problems: Sequence[str], things: str) -> str:
    """Show the first problems, a line each, and count the others."""
    hidden = len(problems) - PROBLEMS_SHOWN
    return "\n".join([*problems[:PROBLEMS_SHOWN], *([f"... and {hidden:,} more {things}"] if hidden > 0 else [])])
