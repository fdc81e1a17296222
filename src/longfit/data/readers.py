"""One file in, its raw content out: decoded text, or rows with the line each begins on.

Nothing here knows folders, chat formats or tokens. Every reader streams where its format allows it, raises `DataError`
without the file's name (`sources.py` adds it) and never guesses: text is UTF-8, or what its byte order mark says, or
the encoding the caller names. Line ends become ``\\n`` in text files; text inside rows is left as it is.
"""

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from typing import Any, BinaryIO

from longfit.errors import ConfigError, DataError

Row = dict[str, Any]
NumberedRow = tuple[int, Row]  # the line (row number in binary formats) it begins on, from 1; the row

# Longest first: the UTF-32 mark begins with the bytes of the UTF-16 one.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
PARQUET_BATCH_ROWS = 64  # rows held at once: long documents are megabytes each
CSV_FIELD_CHARS = 2**31 - 1  # the csv module refuses fields above 131,072 characters unless told; a book is longer


def decode_text(data: bytes, *, encoding: str | None = None) -> str:
    """Decode bytes by an explicit policy: ``encoding`` if named, else the byte order mark, else strict UTF-8.

    Args:
        data: a whole file.
        encoding: a Python codec name; overrules everything else.
    Returns: text without byte order mark.
    Raises:
        DataError: a NUL byte (binary) or an undecodable byte; names the offset and the way out.
        ConfigError: Python has no codec of that name.
    """
    chosen = encoding or next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    if chosen in ("utf-8", "utf-8-sig") and (nul := data.find(0)) >= 0:
        raise DataError(
            f"binary, not text: NUL byte at offset {nul:,}; leave the file out with exclude, "
            "or name its encoding if it is text (for example encoding='utf-16-le')"
        )
    try:
        return data.decode(chosen)
    except LookupError:
        raise ConfigError(
            f"encoding {encoding!r}: Python knows no such encoding; try utf-8, latin-1, cp1252 or utf-16"
        ) from None
    except UnicodeDecodeError as error:
        byte = f" (0x{data[error.start]:02x})" if error.start < len(data) else ""
        raise DataError(
            f"not {chosen} at byte offset {error.start:,}{byte}; save it as UTF-8 (iconv -f latin1 -t utf-8 OLD > "
            "NEW), name its encoding (for example encoding='latin-1'), or leave it out with exclude"
        ) from None


def read_text(stream: BinaryIO, *, encoding: str | None = None) -> str:
    """Read a text file whole; ``\\r\\n`` and ``\\r`` become ``\\n``."""
    return decode_text(stream.read(), encoding=encoding).replace("\r\n", "\n").replace("\r", "\n")


def read_html(stream: BinaryIO, *, encoding: str | None = None) -> str:
    """Read the visible text of a web page: no tags, scripts, styles; blocks on lines of their own, `<pre>` as is."""
    extractor = _VisibleText()
    extractor.feed(read_text(stream, encoding=encoding))
    extractor.close()
    return extractor.text()


class _VisibleText(HTMLParser):
    """Collect what a reader of the page would see."""

    HIDDEN = frozenset({"script", "style", "template", "svg"})
    BLOCKS = frozenset(
        """address article aside blockquote br dd div dl dt figure footer form h1 h2 h3 h4 h5 h6 header hr li main nav
        ol p pre section table title tr ul""".split()  # noqa: SIM905 (thirty lines otherwise)
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._pieces: list[str] = []
        self._hidden = 0
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self.HIDDEN
        self._preformatted += tag == "pre"
        if tag in self.BLOCKS:
            self._pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in self.HIDDEN))
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        if tag in self.BLOCKS:
            self._pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._preformatted:
            self._pieces.append(data)
            return
        words = " ".join(data.split())
        self._pieces.append(" " * data[:1].isspace() + words + " " * (bool(words) and data[-1:].isspace()))

    def text(self) -> str:
        """Join the pieces; at most one empty line in a row."""
        lines: list[str] = []
        for line in "".join(self._pieces).split("\n"):
            line = line.rstrip() if line.strip() else ""
            if line or (lines and lines[-1]):
                lines.append(line)
        return "\n".join(lines).strip("\n")


def read_jsonl(stream: BinaryIO, *, encoding: str | None = None) -> Iterator[NumberedRow]:
    """Yield one row per non-empty line.

    Raises: DataError: bad JSON, with line and column; a line that is not an object.
    """
    for number, line in enumerate(_decoded_lines(stream, encoding=encoding), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"bad JSON at line {number} column {error.colno}: {error.msg}") from None
            yield number, _as_row(row, number)


def read_json(stream: BinaryIO, *, encoding: str | None = None) -> Iterator[NumberedRow]:
    """Yield the rows of a JSON file: a list of objects, or objects one after the other (a JSONL file called .json).

    Raises: DataError: bad JSON, with line and column; anything but objects; a lone object, which is not a table of
        rows.
    """
    text = decode_text(stream.read(), encoding=encoding)
    decoder, position, line = json.JSONDecoder(), _skip_space(text, 0), 1
    in_list = text.startswith("[", position)
    expects_row = True
    position, rows = position + in_list, 0
    line += text.count("\n", 0, position)
    while True:
        start = _skip_space(text, position)
        line += text.count("\n", position, start)
        if start == len(text) and not in_list:
            break
        character = text[start : start + 1]
        if in_list and character == "]" and (not expects_row or rows == 0):
            start = _skip_space(text, start + 1)
            if start != len(text):
                raise DataError(f"bad JSON at {_line_column(text, start)}: text after the end of the list")
            return
        if in_list and not expects_row:
            if character != ",":
                raise DataError(f"bad JSON at {_line_column(text, start)}: expecting ',' or ']'")
            position, expects_row = start + 1, True
            continue
        try:
            row, position = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise DataError(f"bad JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
        if not in_list and rows == 0 and _skip_space(text, position) == len(text):
            raise DataError(
                "a single JSON object, not rows; expected a list of objects or one object per line; "
                "leave it out with exclude"
            )
        yield line, _as_row(row, line)
        line += text.count("\n", start, position)
        rows, expects_row = rows + 1, not in_list


def read_csv(stream: BinaryIO, *, encoding: str | None = None, delimiter: str = ",") -> Iterator[NumberedRow]:
    """Yield the rows of a table with a header line; quoted fields may hold line breaks and be as long as a book.

    Raises: DataError: bad quoting, or a row with more or fewer fields than the header.
    """
    csv.field_size_limit(CSV_FIELD_CHARS)
    table = csv.reader(_decoded_lines(stream, encoding=encoding), delimiter=delimiter, strict=True)
    try:
        header = next(table, None)
        if header is None:
            return
        first_line = table.line_num + 1
        for fields in table:
            if fields:
                if len(fields) != len(header):
                    raise DataError(
                        f"line {first_line}: {len(fields)} fields, but the header has {len(header)} "
                        f"({', '.join(header)}); quote fields that hold the delimiter or a line break"
                    )
                yield first_line, dict(zip(header, fields, strict=True))
            first_line = table.line_num + 1
    except csv.Error as error:
        raise DataError(f"bad CSV at line {table.line_num}: {error}") from None


def read_parquet(stream: BinaryIO) -> Iterator[NumberedRow]:
    """Yield the rows of a Parquet file, a few at a time.

    Raises: DataError: not a Parquet file.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        batches = pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=PARQUET_BATCH_ROWS)
        yield from _numbered(batches)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"not a readable Parquet file: {error}") from None


def read_arrow(stream: BinaryIO) -> Iterator[NumberedRow]:
    """Yield the rows of an Arrow stream, the format of ``datasets``' ``save_to_disk``.

    Raises: DataError: not an Arrow stream.
    """
    import pyarrow
    import pyarrow.ipc  # type: ignore[import-untyped]

    try:
        yield from _numbered(pyarrow.ipc.open_stream(stream))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"not a readable Arrow stream: {error}") from None


def _numbered(batches: Iterable[Any]) -> Iterator[NumberedRow]:
    number = 1
    for batch in batches:
        for start in range(0, batch.num_rows, PARQUET_BATCH_ROWS):
            for row in batch.slice(start, PARQUET_BATCH_ROWS).to_pylist():
                yield number, row
                number += 1


def _decoded_lines(stream: BinaryIO, *, encoding: str | None) -> Iterator[str]:
    """Yield decoded lines with their ends; UTF-8 is streamed, any other encoding is decoded whole."""
    first = stream.readline()
    marked = next((name for mark, name in BYTE_ORDER_MARKS if first.startswith(mark)), "utf-8")
    if encoding not in (None, "utf-8") or marked not in ("utf-8", "utf-8-sig"):
        yield from io.StringIO(decode_text(first + stream.read(), encoding=encoding), newline="")
        return
    offset, line = 0, first
    while line:
        try:
            yield decode_text(line, encoding=marked if offset == 0 else "utf-8")
        except DataError:
            rest = line.find(0)
            problem = "NUL byte, so binary," if rest >= 0 else "not UTF-8"
            rest = rest if rest >= 0 else _first_undecodable(line)
            raise DataError(
                f"{problem} at byte offset {offset + rest:,}; save it as UTF-8, name its encoding "
                "(for example encoding='latin-1'), or leave it out with exclude"
            ) from None
        offset += len(line)
        line = stream.readline()


def _first_undecodable(line: bytes) -> int:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _as_row(value: object, line: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f'line {line}: {type(value).__name__} where an object was expected; write each row as {{"text": "..."}}'
        )
    return value


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _line_column(text: str, position: int) -> str:
    return f"line {text.count(chr(10), 0, position) + 1} column {position - text.rfind(chr(10), 0, position)}"
