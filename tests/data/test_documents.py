"""Paths become documents in one fixed order; what is not read is listed, what is wrong is named with its place."""

import json
import os
import unicodedata
import zipfile
from hashlib import blake2b
from pathlib import Path

import pytest

from longfit.data.document import Document
from longfit.data.documents import Documents, read_documents, split_documents
from longfit.errors import ConfigError, DataError


def write(root: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def rows(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def test_a_folder_is_read_recursively_in_sorted_order_and_the_rest_is_listed(tmp_path: Path) -> None:
    write(tmp_path, b_DOT_txt="two", a__z_DOT_md="one", a__page_DOT_html="<p>web</p>", c_DOT_PY="x = 1")
    write(tmp_path, _DOT_hidden__x_DOT_txt="no", _DOT_env="no", Makefile="no", pic_DOT_png=b"\x89PNG\x00")
    os.symlink(tmp_path / "a", tmp_path / "loop")
    os.symlink(tmp_path / "gone.txt", tmp_path / "broken.txt")
    documents = read_documents(tmp_path)
    assert [(document.name, document.text) for document in documents] == [
        ("a/page.html", "web"),
        ("a/z.md", "one"),
        ("b.txt", "two"),
        ("c.PY", "x = 1"),
    ]
    assert dict(documents.report.skipped) == {
        ".hidden/": "hidden folder",
        ".env": "hidden",
        "Makefile": "without extension",
        "pic.png": "of unknown kind .png",
        "loop/": "symbolic link to a folder",
        "broken.txt": "broken link or special file",
    }
    assert documents.report.warnings()[0].startswith("6 files not read (1 ")
    assert list(documents) == list(documents)  # read again, not used up
    names = [document.name for document in read_documents(tmp_path, exclude=["*.md", "c.*"])]
    assert names == ["a/page.html", "b.txt"]
    assert [document.name for document in read_documents(tmp_path, exclude=["a"])] == ["b.txt", "c.PY"]


def test_tables_give_a_document_a_row_with_its_line(tmp_path: Path) -> None:
    write(tmp_path, t_DOT_jsonl=rows({"text": "a"}, {"text": "b"}), u_DOT_csv="id,text\n1,c\n")
    documents = list(read_documents(tmp_path))
    assert [(document.name, document.text, document.line) for document in documents] == [
        ("t.jsonl:1", "a", 1),
        ("t.jsonl:2", "b", 2),
        ("u.csv:2", "c", 2),
    ]
    assert documents[0].source == str(tmp_path / "t.jsonl")
    chosen = read_documents(tmp_path / "u.csv", text_column="id")
    assert [document.text for document in chosen] == ["1"]


def test_archives_are_read_in_place(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "books.zip", "w") as archive:
        archive.writestr("z.txt", "last")
        archive.writestr("part/a.jsonl", rows({"text": "first"}))
        archive.writestr("__MACOSX/z.txt", "no")
        archive.writestr("more.zip", b"")
    for path, prefix in ((tmp_path / "books.zip", "books.zip"), (tmp_path, "books.zip")):
        documents = read_documents(path)
        assert [document.name for document in documents] == [f"{prefix}!/part/a.jsonl:1", f"{prefix}!/z.txt"]
        assert ("books.zip!/more.zip", "archive inside an archive") in documents.report.skipped
    (tmp_path / "bad.zip").write_bytes(b"PK not")
    with pytest.raises(DataError, match=r"bad\.zip: the archive cannot be read"):
        read_documents(tmp_path)


def test_a_saved_data_set_is_read_without_its_metadata(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(tmp_path / "set")
    assert [document.text for document in read_documents(tmp_path / "set")] == ["a", "b"]


def test_files_without_any_text_say_so(tmp_path: Path) -> None:
    write(tmp_path, c_DOT_txt=" \n", d_DOT_txt="")
    with pytest.raises(DataError, match="2 documents, all empty; nothing to train on"):
        read_documents(tmp_path)


def test_all_damaged_files_are_named_at_once(tmp_path: Path) -> None:
    write(tmp_path, a_DOT_txt=b"ok\x00", b_DOT_txt=b"caf\xe9", c_DOT_jsonl='{"text": 1}\n{"text": "x"}\n{"text": []}\n')
    write(tmp_path, d_DOT_txt="fine", e_DOT_csv="id,n\n1,2\n", f_DOT_jsonl=b'{"text": "\\ud83d"}')
    with pytest.raises(DataError) as caught:
        read_documents(tmp_path)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("a.txt", "b.txt", "c.jsonl", "c.jsonl", "e.csv", "f.jsonl"),
        "6 of 8 rows or files cannot be used; correct them, or leave them out with data.bad_rows=skip",
    ]
    skipped = read_documents(tmp_path, bad_rows="skip")
    assert [document.text for document in skipped] == ["x", "fine"]
    assert [problem.split(":")[0] for problem in skipped.report.bad_rows] == [line.split(":")[0] for line in lines[:-1]]
    assert "NUL byte at offset 2" in lines[0]
    assert "byte offset 3" in lines[1]
    assert "line 1: column 'text' holds int" in lines[2]
    assert "line 3: column 'text' holds list" in lines[3]
    assert "columns 'id', 'n' are not recognised; known: messages | conversations" in lines[4]
    assert "half a character, '\\ud83d'" in lines[5]
    write(tmp_path, **{f"bad{i}_DOT_txt": b"\x00" for i in range(20)})
    with pytest.raises(DataError, match=r"\.\.\. and 16 more problems"):
        read_documents(tmp_path)


def test_kinds_of_rows_are_not_mixed(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    write(tmp_path, a_DOT_jsonl=rows({"text": "x"}, chat))
    with pytest.raises(DataError, match=r"a\.jsonl: line 2: mixed rows: messages here, but text at line 1"):
        read_documents(tmp_path)
    write(tmp_path, a_DOT_jsonl=rows(chat), b_DOT_txt="x")
    with pytest.raises(DataError, match=r"chats \(a.jsonl:1\) and plain text \(b.txt\) are mixed"):
        read_documents(tmp_path)
    (document,) = read_documents(tmp_path / "a.jsonl")
    assert document.messages == tuple(chat["messages"])


def test_empty_and_repeated_documents_are_counted(tmp_path: Path) -> None:
    write(tmp_path, a_DOT_jsonl=rows({"text": "x"}, {"text": ""}, {"text": None}, {"text": "x"}))
    documents = read_documents(tmp_path)
    assert [document.line for document in documents] == [1, 4]
    assert documents.report.empty == ("a.jsonl:2", "a.jsonl:3")
    assert documents.report.duplicates == ("a.jsonl:4",)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, a_DOT_jsonl=rows({"text": "x"}, {"text": "y"}))
    documents = read_documents(tmp_path)
    write(tmp_path, a_DOT_jsonl=rows({"text": "x"}, {"text": "z"}))
    with pytest.raises(DataError, match=r"a\.jsonl:2: changed while it was being read"):
        list(documents)
    write(tmp_path, a_DOT_jsonl=rows({"text": "x"}))
    with pytest.raises(DataError, match="1 documents vanished from"):
        list(documents)


def test_held_out_documents_are_whole_and_have_no_twin_in_training() -> None:
    texts = [f"text {i % 40}" for i in range(60)]  # the first 20 occur twice
    documents = Documents.of(Document(f"d{i}", text=text) for i, text in enumerate(texts))
    train, held = split_documents(documents, validation_fraction=0.25, seed=1)
    assert len(train) + len(held) == 60
    assert len(held) == 15
    assert {d.text for d in train} & {d.text for d in held} == set()
    again, _ = split_documents(documents, validation_fraction=0.25, seed=1)
    assert again.digest() == train.digest()
    assert split_documents(documents, validation_fraction=0.25, seed=2)[0].digest() != train.digest()
    assert train.num_shared(documents) == len({d.text for d in train})
    assert train.num_shared(held) == 0
    assert len(split_documents(documents, validation_fraction=0)[1]) == 0
    assert len(split_documents(documents, validation_fraction=0.001)[1]) == 1


def test_the_choice_of_held_out_documents_is_pinned_across_machines_and_versions() -> None:
    documents = Documents.of(Document(f"d{i}", text=f"text {i // 2}") for i in range(16))
    held = split_documents(documents, validation_fraction=0.3, seed=-5)[1]
    key = (-5).to_bytes(16, "little", signed=True)
    ranked = sorted({d.fingerprint() for d in documents}, key=lambda digest: blake2b(digest, key=key).digest())
    assert {d.fingerprint() for d in held} == set(ranked[:2])  # 5 of 16 are asked for, and twins stay together
    assert len(held) == 4


def test_splits_that_cannot_be_are_refused() -> None:
    twins = Documents.of([Document("a", text="x"), Document("b", text="x")])
    with pytest.raises(DataError, match=r"2 documents \(1 different\) cannot give 1 .*: data\.validation=FILE$"):
        split_documents(twins, validation_fraction=0.5)
    three = Documents.of(Document(name, text=name) for name in "abc")
    with pytest.raises(DataError, match=r"data\.validation=FILE, or give a smaller data\.validation_fraction"):
        split_documents(three, validation_fraction=0.9)
    with pytest.raises(ConfigError, match=r"validation_fraction 1\.0: must be at least 0 and below 1"):
        split_documents(twins, validation_fraction=1.0)


def test_decomposed_unicode_is_counted_and_composed_where_asked(tmp_path: Path) -> None:
    composed = "Tiếng Việt rất đẹp word"
    (tmp_path / "a.txt").write_text(unicodedata.normalize("NFD", composed), encoding="utf-8")
    documents = read_documents(tmp_path)
    assert (documents.report.num_decomposed, documents.report.num_words) == (4, 5)
    assert any("4 of 5 words are decomposed Unicode" in line for line in documents.report.warnings())
    documents = read_documents(tmp_path, normalise="nfc")
    assert [document.text for document in documents] == [composed]
    assert documents.report.num_decomposed == 0


def test_columns_that_nothing_reads_are_counted(tmp_path: Path) -> None:
    write(tmp_path, a_DOT_jsonl=rows({"text": "x", "id": 1, "note": ""}, {"text": "y", "id": 2, "url": "u"}))
    report = read_documents(tmp_path).report
    assert report.unread == (("id", 2), ("url", 1))
    assert "columns that nothing reads: id (2), url (1)" in report.warnings()
