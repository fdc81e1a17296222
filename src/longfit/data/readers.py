"""One file in, its raw content out: decoded text, or rows with the line each begins on.

Nothing here knows folders, chat formats or tokens. Every reader streams where its format allows it, raises `DataError`
without the file's name (`sources.py` adds it) and never guesses: text is UTF-8, or what its byte order mark says, or
the encoding the caller names. Line ends become ``\\n`` in text files; text inside rows is left as it is.
"""

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO

from longfit.errors import ConfigError, DataError
from longfit.files.expansion import require_modest

Row = dict[str, Any]
# The line (row number in binary formats) a row begins on, from 1; the row, or what is wrong with that one row.
NumberedRow = tuple[int, Row | DataError]

# Longest first: the UTF-32 mark begins with the bytes of the UTF-16 one.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
NO_TEXT = {b"%PDF-": "a PDF document", b"{\\rtf": "an RTF document", b"%!PS": "a PostScript document"}
PARQUET_BATCH_ROWS = 64  # rows held at once: long documents are megabytes each
LEAST_ROW_BYTES = 64  # that a row costs, however well it was compressed
DENSE_TABLE = "write it as .jsonl, or split it"
WRAPPERS = (
    "data",
    "rows",
    "train",
    "validation",
    "test",
    "examples",
    "instances",
    "records",
    "items",
    "results",
    "entries",
)
DELIMITERS = (",", ";", "\t", "|")
SEPARATOR_LINE = re.compile(r"sep=(.)", re.I)
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
            f"binary, not text: NUL byte at offset {nul:,}; leave the file out with data.exclude, "
            "or name its encoding if it is text (such as data.encoding=utf-16-le)"
        )
    try:
        return data.decode(chosen)
    except LookupError:
        raise ConfigError(
            f"data.encoding {encoding!r}: Python knows no such encoding; try utf-8, latin-1, cp1252 or utf-16"
        ) from None
    except UnicodeDecodeError as error:
        byte = f" (0x{data[error.start]:02x})" if error.start < len(data) else ""
        raise DataError(
            f"not {chosen} at byte offset {error.start:,}{byte}; save it as UTF-8 (iconv -f latin1 -t utf-8 OLD > "
            "NEW), name its encoding (such as data.encoding=latin-1), or leave it out with data.exclude"
        ) from None


def read_text(stream: BinaryIO, *, encoding: str | None = None) -> str:
    """Read a text file whole; ``\\r\\n`` and ``\\r`` become ``\\n``.

    Raises: DataError, ConfigError: as `decode_text`; a document of another format by the name of a text.
    """
    data = stream.read()
    if found := next((name for mark, name in NO_TEXT.items() if data.startswith(mark)), None):
        raise DataError(f"{found} by the name of a text; give it its own ending, or leave it out with data.exclude")
    return decode_text(data, encoding=encoding).replace("\r\n", "\n").replace("\r", "\n")


def read_jsonl(stream: BinaryIO, *, encoding: str | None = None) -> Iterator[NumberedRow]:
    """Yield one row per non-empty line.

    A line that is bad JSON or no object is yielded as the error it is, with line and column.
    """
    decode = json.JSONDecoder(object_pairs_hook=_object).decode
    is_any = False
    for number, line in enumerate(_decoded_lines(stream, encoding=encoding), start=1):
        if line.strip():
            row: Row | DataError
            try:
                row = decode(line)
            except json.JSONDecodeError as error:
                if not is_any and error.pos >= len(line.rstrip()):
                    raise DataError(_goes_on(number)) from None
                row = DataError(f"bad JSON at line {number} column {error.colno}: {error.msg}{_repair(line, error)}")
            except (ValueError, RecursionError) as error:
                row = DataError(f"line {number}: {_unreadable(error)}")
            if not is_any and isinstance(row, list) and row and all(isinstance(item, dict) for item in row):
                raise DataError(f"line {number}: a list of rows, so this is JSON, not JSONL; name the file .json")
            is_any = True
            if not isinstance(row, dict | DataError):
                row = DataError(f"line {number}: {_no_object(row)}")
            yield number, row


def read_json(
    stream: BinaryIO, *, encoding: str | None = None, beside: list[str] | None = None
) -> Iterator[NumberedRow]:
    """Yield the rows of a JSON file.

    These are a list of objects; an object that holds the list under one of `WRAPPERS`; objects one after the other (a
    JSONL file called .json); or one object, which is one row.

    Args:
        beside: collects what a wrapping object says beside its list, by key: no row has it.
    Raises: DataError: bad JSON, with line and column; anything but objects.
    """
    text = decode_text(stream.read(), encoding=encoding)
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    position, line = _skip_space(text, 0), 1
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
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {line}: {_unreadable(error)}") from None
        if not in_list and rows == 0 and _skip_space(text, position) == len(text):
            yield from _rows_inside(row, line, [] if beside is None else beside)
            return
        yield line, _as_row(row, line)
        line += text.count("\n", start, position)
        rows, expects_row = rows + 1, not in_list


def _rows_inside(value: object, line: int, beside: list[str]) -> Iterator[NumberedRow]:
    """Yield the rows that a single JSON object holds, or the object as the one row it is."""
    row = _as_row(value, line)
    lists = [key for key in WRAPPERS if isinstance(row.get(key), list)]
    if len(lists) > 1:
        raise DataError(f"one object with several sets of rows, {', '.join(lists)}; write each into a file of its own")
    if not lists:
        yield line, row
        return
    beside += [key for key, value in row.items() if key != lists[0] and value not in (None, "", [], {})]
    for number, inner in enumerate(row[lists[0]], start=1):
        yield number, _as_row(inner, number, what=f"{lists[0]}[{number - 1}]")


def read_csv(stream: BinaryIO, *, encoding: str | None = None, delimiter: str | None = None) -> Iterator[NumberedRow]:
    """Yield the rows of a table with a header line; quoted fields may hold line breaks and be as long as a book.

    A row with more or fewer fields than the header is yielded as the error it is.

    Args:
        delimiter: None takes what a first line ``sep=;`` says (Excel), else a comma, or what else of `DELIMITERS` the
            header has where it has no comma.
    Raises: DataError: bad quoting, or a column name twice.
    """
    csv.field_size_limit(CSV_FIELD_CHARS)
    lines = _decoded_lines(stream, encoding=encoding)
    first, before = next(lines, ""), 0
    while first and (not first.strip() or SEPARATOR_LINE.fullmatch(first.strip())):
        if told := SEPARATOR_LINE.fullmatch(first.strip()):
            delimiter = told[1]
        first, before = next(lines, ""), before + 1
    if delimiter is None:
        names = re.sub(r'"[^"]*"', "", first)  # what is quoted separates nothing
        delimiter = next((found for found in DELIMITERS if found in names), DELIMITERS[0])
    table = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    try:
        header = next(table, None)
        if header is None:
            return
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise DataError(
                f"line {before + 1}: the column {twice[0]!r} is there {header.count(twice[0])} times; rename one"
            )
        first_line = before + table.line_num + 1
        for fields in table:
            if len(fields) == len(header):
                yield first_line, dict(zip(header, fields, strict=True))
            elif fields:
                yield (
                    first_line,
                    DataError(
                        f"line {first_line}: {len(fields)} fields, but the header has {len(header)} "
                        f"({', '.join(header)}); quote fields that hold the delimiter or a line break"
                    ),
                )
            first_line = before + table.line_num + 1
    except csv.Error as error:
        raise DataError(f"bad CSV at line {before + table.line_num}: {error}") from None


def read_parquet(stream: BinaryIO) -> Iterator[NumberedRow]:
    """Yield the rows of a Parquet file, a few at a time.

    Raises: DataError: not a Parquet file, or one that holds far more than its size lets expect.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        num_bytes = stream.seek(0, io.SEEK_END)
        table = pyarrow.parquet.ParquetFile(stream)
        groups = (table.metadata.row_group(number) for number in range(table.metadata.num_row_groups))
        claimed = sum(max(group.total_byte_size, group.num_rows * LEAST_ROW_BYTES) for group in groups)
        require_modest(claimed, num_bytes, do=DENSE_TABLE)
        yield from _numbered(table.iter_batches(batch_size=PARQUET_BATCH_ROWS), lambda: num_bytes)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"not a readable Parquet file: {error}") from None


def read_arrow(stream: BinaryIO) -> Iterator[NumberedRow]:
    """Yield the rows of an Arrow stream, the format of ``datasets``' ``save_to_disk``.

    Raises: DataError: not an Arrow stream, or one that holds far more than was read of it.
    """
    import pyarrow
    import pyarrow.ipc  # type: ignore[import-untyped]

    try:
        yield from _numbered(pyarrow.ipc.open_stream(stream), stream.tell)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"not a readable Arrow stream: {error}") from None


def _numbered(batches: Iterable[Any], num_bytes: Callable[[], int]) -> Iterator[NumberedRow]:
    """Yield the rows of batches that come out of so many bytes: a dictionary or a run holds a value once for many."""
    number, expanded = 1, 0
    for batch in batches:
        expanded += sum(_plain(column).nbytes for column in batch.columns)
        require_modest(expanded, num_bytes(), do=DENSE_TABLE)
        for start in range(0, batch.num_rows, PARQUET_BATCH_ROWS):
            for row in batch.slice(start, PARQUET_BATCH_ROWS).to_pylist():
                yield number, {key: _without_nulls(value) for key, value in row.items()}
                number += 1


def _plain(column: Any) -> Any:
    """A column of an Arrow batch with each value as often as it is there."""
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


def _without_nulls(value: Any) -> Any:
    """Take out of nested objects what only the file's schema put there: one row's keys are null in all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


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
                "(such as data.encoding=latin-1), or leave it out with data.exclude"
            ) from None
        offset += len(line)
        line = stream.readline()


def _first_undecodable(line: bytes) -> int:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _as_row(value: object, line: int, *, what: str | None = None) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{what or f'line {line}'}: {_no_object(value)}")
    return value


def _goes_on(line: int) -> str:
    return (
        f"line {line}: an object or a list that goes on in the next line, so this is JSON, not JSONL (a row in each "
        "line); name the file .json"
    )


def _repair(line: str, error: json.JSONDecodeError) -> str:
    """What to do about a line that is nearly JSON."""
    rest, begins = line[error.pos :].strip(), line.lstrip()
    if rest == "," and error.msg == "Extra data":
        return "; rows of JSONL stand without commas between them (sed 's/,[[:space:]]*$//' OLD > NEW)"
    if begins.startswith(("#", "//")):
        return "; JSON has no comments: take the line out"
    return "; Python's notation, not JSON: write rows with json.dumps" if begins.startswith("{'") else ""


def _no_object(value: object) -> str:
    rows = '{"text": "..."} or {"messages": [...]}'
    return f"{type(value).__name__} where an object was expected; write each row as {rows}"


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """Make an object of its keys and values, of which JSON's own reader would silently keep the last of two."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DataError(f"the key {twice!r} is there twice in one object; remove one")
    return made


def _unreadable(error: ValueError | RecursionError) -> str:
    """Say why Python's JSON reader gives up on JSON that is well formed."""
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, RecursionError):
        return (
            "lists or objects are nested too deeply to be read; flatten the column, or exclude the file (data.exclude)"
        )
    return "a number has too many digits to be read; write it as a text, or leave the column out"


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _line_column(text: str, position: int) -> str:
    return f"line {text.count(chr(10), 0, position) + 1} column {position - text.rfind(chr(10), 0, position)}"
