"""A file or an archive becomes documents, one at a time; what cannot be read is a problem with its place.

One text file is one document, one row of a table is one document.

What this is not: it does not choose the files of a folder (`files.py`), it knows no tokens (`packing.py`), and it does
not decide what a row means (`layouts.py`).
"""

import io
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from longfit.data import layouts, readers
from longfit.data.containers import open_file, read_members
from longfit.data.document import Document
from longfit.data.extraction import EXTRACTORS, extract
from longfit.data.html import read_html
from longfit.data.messages import Chat
from longfit.errors import DataError, LongfitError
from longfit.files.reading import NOT_OURS, reason


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
        except LongfitError as error:
            _add(problems, self.name, error)
        except NOT_OURS:
            raise
        except BaseException as error:  # whatever a damaged archive leads its readers to
            problems.append(f"{self.name}: cannot be read: {reason(error)}")

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
        except LongfitError as error:
            _add(problems, name, error)
        except NOT_OURS:
            raise
        except BaseException as error:  # whatever a damaged file leads its readers to
            problems.append(f"{name}: cannot be read: {reason(error)}")

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
        beside: list[str] = []
        for line, row in self._rows(kind, stream, beside):
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
                content = layouts.read_row(row, layout)
                yield line, replace(content, unread=content.unread + tuple(beside)) if beside else content
                beside.clear()
            except DataError as error:
                unnamed = first is None and kind in ("csv", "tsv")
                hint = ". The first line of a table must name its columns" if unnamed else ""
                problems.append(f"{name}: line {line}: {error}{hint}")

    def _rows(self, kind: str, stream: BinaryIO, beside: list[str]) -> Iterator[readers.NumberedRow]:
        encoding = self.reading.encoding
        if kind == "jsonl":
            return readers.read_jsonl(stream, encoding=encoding)
        if kind == "json":
            return readers.read_json(stream, encoding=encoding, beside=beside)
        if kind in ("csv", "tsv"):
            return readers.read_csv(stream, encoding=encoding, delimiter=None if kind == "csv" else "\t")
        return readers.read_parquet(_seekable(stream)) if kind == "parquet" else readers.read_arrow(stream)


def _add(problems: list[str], name: str, error: LongfitError) -> None:
    """Add what is wrong with a file; what is wrong with the settings is wrong with all files."""
    if not isinstance(error, DataError):
        raise error
    problems += [problem if name in problem else f"{name}: {problem}" for problem in str(error).splitlines()]


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
