"""Files become text or rows; damage is named with its place."""

import io
import json
from collections.abc import Callable
from typing import BinaryIO

import pytest

from longfit.data import readers
from longfit.errors import ConfigError, DataError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_decoded_by_utf8_or_its_byte_order_mark(encoding: str) -> None:
    assert readers.decode_text("Ünï \U0001f600".encode(encoding)) == "Ünï \U0001f600"


def test_other_text_is_an_error_until_its_encoding_is_named() -> None:
    data = "caf\u00e9".encode("latin-1")
    with pytest.raises(DataError, match=r"not utf-8 at byte offset 3 \(0xe9\); save it as UTF-8"):
        readers.decode_text(data)
    assert readers.decode_text(data, encoding="latin-1") == "café"
    with pytest.raises(DataError, match="binary, not text: NUL byte at offset 4"):
        readers.decode_text(b"\x7fELF\x00")
    assert readers.decode_text("ab".encode("utf-16-le"), encoding="utf-16-le") == "ab"
    with pytest.raises(ConfigError, match="encoding 'latin1000': Python knows no such encoding"):
        readers.decode_text(data, encoding="latin1000")


def test_line_ends_become_newlines_in_text() -> None:
    assert readers.read_text(io.BytesIO(b"a\r\nb\rc\n")) == "a\nb\nc\n"


def test_bad_rows_are_told_one_by_one_and_the_others_go_on() -> None:
    def told(rows: object) -> list[str]:
        return [f"{number} {row}" for number, row in rows]  # type: ignore[attr-defined]

    found = told(readers.read_jsonl(io.BytesIO(b'{"a": }\n[1]\n{"a": 1, "a": 2}\n{"a": 3}\n')))
    assert found[0].startswith("1 bad JSON at line 1 column 7")
    assert found[1].startswith("2 line 2: list where an object was expected")
    assert found[2].startswith("3 line 3: the key 'a' is there twice")
    assert found[3] == "4 {'a': 3}"
    found = told(readers.read_csv(io.BytesIO(b"a,b\n1,2\n3\n4,5\n")))
    assert found[1].startswith("3 line 3: 1 fields, but the header has 2 (a, b)")
    assert found[2] == "4 {'a': '4', 'b': '5'}"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_table_is_read_with_the_separator_that_its_header_has(delimiter: str) -> None:
    data = f"text{delimiter}id\n'a{delimiter}1\n".encode()
    assert list(readers.read_csv(io.BytesIO(data))) == [(2, {"text": "'a", "id": "1"})]


def test_one_object_is_a_row_or_holds_the_rows() -> None:
    assert list(readers.read_json(io.BytesIO(b'{"text": "a"}'))) == [(1, {"text": "a"})]
    wrapped = b'{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}'
    assert list(readers.read_json(io.BytesIO(wrapped))) == [(1, {"text": "a"}), (2, {"text": "b"})]


def test_nulls_that_a_tables_schema_adds_are_not_read() -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"calls": [{"city": "Hue"}], "text": None}, {"calls": [{"zone": "UTC"}], "text": "t"}]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert list(readers.read_parquet(io.BytesIO(file.getvalue()))) == [(1, rows[0]), (2, rows[1])]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_jsonl_rows_carry_their_lines(mark: bytes) -> None:
    rows = list(readers.read_jsonl(io.BytesIO(mark + b'{"text": "a"}\n\n{"text": "\xc3\xa9"}')))
    assert rows == [(1, {"text": "a"}), (3, {"text": "é"})]
    wide = '{"text": "é"}\n{"text": "ö"}\n'.encode("utf-16")
    assert list(readers.read_jsonl(io.BytesIO(wide))) == [(1, {"text": "é"}), (2, {"text": "ö"})]


@pytest.mark.parametrize(
    "text",
    ['[{"a": 1},\n {"a": [2]}\n]\n', '{"a": 1}\n{"a": [2]}\n', '{"a": 1} \n {"a":\n [2]}'],
)
def test_json_holds_a_list_or_objects_one_after_the_other(text: str) -> None:
    assert list(readers.read_json(io.BytesIO(text.encode()))) == [(1, {"a": 1}), (2, {"a": [2]})]


def test_json_without_rows_is_no_rows() -> None:
    assert list(readers.read_json(io.BytesIO(b"[ ]"))) == list(readers.read_json(io.BytesIO(b""))) == []


@pytest.mark.parametrize(
    ("read", "data", "message"),
    [
        (readers.read_jsonl, b'{"a": 1}\n{"a": "\xe9"}\n', "not UTF-8 at byte offset 16;"),
        (readers.read_jsonl, b'{"a": 1}\n\x00\x00', "NUL byte, so binary, at byte offset 9;"),
        (readers.read_json, b'[{"a": 1}\n {"a": 2}]', "bad JSON at line 2 column 2: expecting ',' or ']'"),
        (readers.read_json, b'[{"a": 1},\n]', "bad JSON at line 2 column 1"),
        (readers.read_json, b'[{"a": 1}', "bad JSON at line 1 column 10"),
        (readers.read_json, b'[{"a": 1}] x', "bad JSON at line 1 column 12: text after the end"),
        (readers.read_json, b'[{"a": 1},\n 7]', "line 2: int where an object"),
        (readers.read_json, b'{"train": [{"a": 1}], "test": [{"a": 2}]}', "several sets of rows, train, test"),
        (readers.read_json, b'[{"a": 1, "a": 2}]', "line 1: the key 'a' is there twice in one object"),
        (readers.read_json, b'[{"a": ' + b"[" * 99_999, "line 1: lists or objects are nested too deeply"),
        (readers.read_json, b'[{"a": ' + b"9" * 9_999 + b"}]", "line 1: a number has too many digits"),
        (readers.read_csv, b"a,b,a\n1,2,3\n", "line 1: the column 'a' is there 2 times; rename one"),
        (readers.read_csv, b'a\n"x"y\n', "bad CSV at line 2"),
        (readers.read_parquet, b"PAR0 is not", "not a readable Parquet file"),
        (readers.read_arrow, b"\xff\xff\xff\xff\x10\x00\x00\x00 is not", "not a readable Arrow stream"),
    ],
)
def test_damaged_tables_say_where(read: Callable[[BinaryIO], object], data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read(io.BytesIO(data)))  # type: ignore[call-overload]


def test_csv_fields_may_be_books_with_line_breaks() -> None:
    book = "word, " * 50_000 + 'a "quote"\nand a line\n'
    quoted = '"' + book.replace('"', '""') + '"'
    rows = list(readers.read_csv(io.BytesIO(f"id,text\n1,{quoted}\n2,short\n".encode())))
    assert rows == [(2, {"id": "1", "text": book}), (5, {"id": "2", "text": "short"})]
    assert list(readers.read_csv(io.BytesIO(b"text\tn\nx, y\t1\n"), delimiter="\t")) == [
        (2, {"text": "x, y", "n": "1"})
    ]


def test_parquet_and_arrow_rows_are_read_in_small_batches() -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"row {i}", "messages": [{"role": "user"}]} for i in range(readers.PARQUET_BATCH_ROWS + 3)]
    table = pyarrow.Table.from_pylist(rows)
    parquet, arrow = io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet)
    with pyarrow.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    expected = list(enumerate(rows, start=1))
    assert list(readers.read_parquet(io.BytesIO(parquet.getvalue()))) == expected
    assert list(readers.read_arrow(io.BytesIO(arrow.getvalue()))) == expected


@pytest.mark.parametrize("rows", ["long", "many", "one"])
def test_a_table_is_not_far_larger_than_its_file(rows: str) -> None:
    """Dictionaries and compression make of a few bytes: many long texts, more rows than can be, a text as large."""
    import pyarrow
    import pyarrow.parquet

    num_rows, text = {"long": (200, "x" * 1_000_000), "many": (2_000_000, "x"), "one": (1, "x" * 70_000_000)}[rows]
    indices = pyarrow.array([0]).take(pyarrow.array([0] * num_rows)).cast(pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([text]))
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file, compression="zstd")
    with pytest.raises(DataError, match=r"unpack to .* or more; allowed are 64.0 MiB: write it as .jsonl"):
        for _ in readers.read_parquet(io.BytesIO(file.getvalue())):
            pass


def test_json_round_trips_whatever_json_writes() -> None:
    rows = [{"text": "a\nb ] , {"}, {"text": '\u2028 \\ "'}, {}]
    for text in (json.dumps(rows), json.dumps(rows, indent=2), "".join(json.dumps(row) + "\n" for row in rows)):
        assert [row for _, row in readers.read_json(io.BytesIO(text.encode()))] == rows
