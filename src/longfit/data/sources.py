"""A file, a folder or an archive becomes documents; what is not read is listed, what cannot be read is an error.

One text file is one document, one row of a table is one document. The path is walked once to check and fingerprint
everything, which keeps some hundred bytes per document; iterating reads the text again, one document at a time. So a
folder larger than memory is never held, and every problem is known before the first token is made.

What this is not: it does not choose the files of a folder (`files.py`), it knows no tokens (`packing.py`), and it does
not decide what a chat row means (`formats.py`).
"""

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from longfit.data import formats, readers
from longfit.data.files import find_files
from longfit.errors import ConfigError, DataError

PROBLEMS_SHOWN = 10  # of possibly thousands: enough to see the pattern


@dataclass(frozen=True, slots=True)
class Document:
    """One unit that is trained on whole: a text, or a chat.

    `line` is where its row begins in `source` (the row's number in Parquet and Arrow files); None for a whole file.
    """

    name: str
    text: str | None = None
    messages: tuple[formats.Message, ...] | None = None
    source: str = ""
    line: int | None = None

    @property
    def is_chat(self) -> bool:
        """Whether it holds messages rather than text."""
        return self.messages is not None

    def fingerprint(self) -> bytes:
        """Digest of the content: equal documents are duplicates.

        Raises: DataError: the text is not valid Unicode.
        """
        content = self.text if self.text is not None else json.dumps(self.messages, sort_keys=True, ensure_ascii=False)
        try:
            return blake2b(content.encode(), digest_size=16).digest()
        except UnicodeEncodeError as error:  # JSON can say "\ud83d" alone; no tokenizer can read it
            half = ascii(content[error.start])
            raise DataError(f"{self.name}: half a character, {half}, at {error.start:,}; write the whole one") from None

    def num_chars(self) -> int:
        """Characters of text, or of all messages' contents."""
        return (
            len(self.text) if self.text is not None else sum(len(message["content"]) for message in self.messages or ())
        )


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What was found under a path: read, skipped, empty and repeated. Nothing is left out without a line here."""

    num_files: int
    num_bytes: int
    skipped: tuple[tuple[str, str], ...] = ()  # (file, why)
    empty: tuple[str, ...] = ()  # documents without text
    duplicates: tuple[str, ...] = ()  # documents equal to an earlier one; they are kept

    def warnings(self) -> list[str]:
        """One line per kind of finding, with its number and first example."""
        lines = []
        if self.skipped:
            reasons = Counter(reason for _, reason in self.skipped)
            counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
            lines.append(f"{len(self.skipped):,} files not read ({counts}); the first: {self.skipped[0][0]}")
        if self.empty:
            lines.append(f"{len(self.empty):,} empty documents left out; the first: {self.empty[0]}")
        if self.duplicates:
            lines.append(
                f"{len(self.duplicates):,} documents repeat an earlier one and are trained on again; "
                f"the first: {self.duplicates[0]}"
            )
        return lines


class Source(Protocol):
    """Where documents come from; reading twice gives the same documents in the same order."""

    def read(self) -> Iterator[Document]: ...


@dataclass(frozen=True, slots=True)
class MemorySource:
    """Documents that are already in memory."""

    documents: tuple[Document, ...]

    def read(self) -> Iterator[Document]:
        return iter(self.documents)


@dataclass(frozen=True, slots=True)
class FileSource:
    """One file on disk or in a zip archive, and how to read it."""

    path: Path
    name: str  # relative to what the user named, as printed
    kind: str  # a value of `files.KIND_OF_SUFFIX`
    member: str | None = None
    encoding: str | None = None
    text_column: str | None = None

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the bytes of the file or of the archive's member."""
        if self.member is None:
            with self.path.open("rb") as stream:
                yield stream
        else:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as member:
                yield cast(BinaryIO, member)

    def read(self) -> Iterator[Document]:
        """Yield the file's documents; every error begins with the file's name."""
        try:
            with self.open() as stream:
                yield from self._documents(stream)
        except DataError as error:
            raise DataError("\n".join(f"{self.name}: {problem}" for problem in str(error).splitlines())) from None
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise DataError(f"{self.name}: cannot be read: {error}") from None

    def _documents(self, stream: BinaryIO) -> Iterator[Document]:
        source = str(self.path) if self.member is None else f"{self.path}!/{self.member}"
        if self.kind == "text":
            yield Document(self.name, text=readers.read_text(stream, encoding=self.encoding), source=source)
            return
        if self.kind == "html":
            yield Document(self.name, text=readers.read_html(stream, encoding=self.encoding), source=source)
            return
        problems: list[str] = []
        for line, content in self._contents(stream, problems):
            name = f"{self.name}:{line}"
            if isinstance(content, str):
                yield Document(name, text=content, source=source, line=line)
            else:
                yield Document(name, messages=content, source=source, line=line)
        if problems:
            raise DataError(listing(problems, "rows"))

    def _contents(
        self, stream: BinaryIO, problems: list[str]
    ) -> Iterator[tuple[int, str | tuple[formats.Message, ...]]]:
        """Yield what each row holds; rows that hold nothing usable are added to `problems`."""
        first: tuple[int, formats.RowShape] | None = None
        for line, row in self._rows(stream):
            try:
                shape = formats.recognise(row, text_column=self.text_column)
            except DataError as error:
                raise DataError(f"line {line}: {error}") from None
            first = first or (line, shape)
            if shape.name != first[1].name:
                raise DataError(
                    f"line {line}: mixed rows: {shape.name} here, but {first[1].name} at line {first[0]}; "
                    "put them into separate files, or name one column with text_column"
                )
            try:
                yield line, formats.row_content(row, shape)
            except DataError as error:
                problems.append(f"line {line}: {error}")

    def _rows(self, stream: BinaryIO) -> Iterator[readers.NumberedRow]:
        if self.kind == "jsonl":
            return readers.read_jsonl(stream, encoding=self.encoding)
        if self.kind == "json":
            return readers.read_json(stream, encoding=self.encoding)
        if self.kind in ("csv", "tsv"):
            return readers.read_csv(stream, encoding=self.encoding, delimiter="," if self.kind == "csv" else "\t")
        return readers.read_parquet(stream) if self.kind == "parquet" else readers.read_arrow(stream)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one document is, and what identifies it."""

    source: int
    position: int  # among the documents of its source
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Documents:
    """A set of documents that is read when it is iterated, not before. Iterate it as often as needed.

    Made by `read_documents`, or by `Documents.of` from documents in memory.
    """

    sources: tuple[Source, ...]
    entries: tuple[_Entry, ...]
    report: SourceReport

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "Documents":
        """Wrap documents that are in memory."""
        return _survey([MemorySource(tuple(documents))], num_bytes=0, skipped=())

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents in order, reading each source once.

        Raises: DataError: a file changed since it was surveyed.
        """
        wanted: dict[int, dict[int, bytes]] = {}
        for entry in self.entries:
            wanted.setdefault(entry.source, {})[entry.position] = entry.fingerprint
        for source, positions in wanted.items():
            found = 0
            for position, document in enumerate(self.sources[source].read()):
                if position in positions:
                    if document.fingerprint() != positions[position]:
                        raise DataError(f"{document.name}: changed while it was being read; start again")
                    found += 1
                    yield document
                    if found == len(positions):
                        break
            if found != len(positions):
                raise DataError(
                    f"{len(positions) - found:,} documents vanished from {self.sources[source]} while it was being "
                    "read; start again"
                )

    def select(self, indices: Iterable[int]) -> "Documents":
        """Keep some of the documents, in their present order."""
        kept = sorted(set(indices))
        return Documents(self.sources, tuple(self.entries[index] for index in kept), self.report)

    @property
    def fingerprints(self) -> list[bytes]:
        """The content digest of each document, in order."""
        return [entry.fingerprint for entry in self.entries]


def read_documents(
    path: str | Path, *, text_column: str | None = None, encoding: str | None = None, exclude: Sequence[str] = ()
) -> Documents:
    """Find and check every document under a path.

    Folders are walked recursively, in sorted order; hidden files, unknown extensions, symbolic links to folders and
    archives inside archives are not read, and listed in `Documents.report`. A file named directly is read as text
    whatever its extension.

    Args:
        path: a text file, a table (.jsonl .json .csv .tsv .parquet .arrow), a .zip, or a folder of them.
        text_column: the column of tables that holds plain text; None recognises it by name (see `formats.py`).
        encoding: of text files and tables, if not UTF-8.
        exclude: glob patterns, matched against the path relative to `path` and each of its parts.
    Raises:
        DataError: as :func:`find_files`, or damaged files: all of them in one message, each with its place.
        ConfigError: unknown encoding.
    """
    path = Path(path)
    found, skipped = find_files(path, exclude)
    files = [FileSource(*file, encoding, text_column) for file in found]
    num_bytes = sum(file.stat().st_size for file in {source.path for source in files})
    return _survey(files, num_bytes=num_bytes, skipped=tuple(skipped), path=path)


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
            raise ConfigError(f"validation_fraction {validation_fraction}: must be at least 0 and below 1; try 0.05")
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
    sources: Sequence[Source], *, num_bytes: int, skipped: tuple[tuple[str, str], ...], path: Path | None = None
) -> Documents:
    """Read every source once: collect problems, drop empty documents, fingerprint the others."""
    entries: list[_Entry] = []
    problems: list[str] = []
    empty: list[str] = []
    duplicates: list[str] = []
    seen: set[bytes] = set()
    kinds: dict[bool, str] = {}  # is_chat -> the first such document
    for index, source in enumerate(sources):
        try:
            for position, document in enumerate(source.read()):
                if document.text is not None and not document.text.strip():
                    empty.append(document.name)
                    continue
                fingerprint = document.fingerprint()
                if fingerprint in seen:
                    duplicates.append(document.name)
                seen.add(fingerprint)
                kinds.setdefault(document.is_chat, document.name)
                entries.append(_Entry(index, position, fingerprint))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(listing(problems, "files"))
    if len(kinds) == 2:
        raise DataError(
            f"chats ({kinds[True]}) and plain text ({kinds[False]}) are mixed; "
            "train on one kind, leave the other out with exclude"
        )
    if not entries:
        raise DataError(f"{path or 'the documents'}: {len(empty):,} documents, all empty; nothing to train on")
    report = SourceReport(len(sources), num_bytes, skipped, tuple(empty), tuple(duplicates))
    return Documents(tuple(sources), tuple(entries), report)


def listing(problems: Sequence[str], things: str) -> str:
    """Show the first problems, a line each, and count the others."""
    hidden = len(problems) - PROBLEMS_SHOWN
    return "\n".join([*problems[:PROBLEMS_SHOWN], *([f"... and {hidden:,} more {things}"] if hidden > 0 else [])])
