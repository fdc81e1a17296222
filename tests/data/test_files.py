"""What is read under a path, in which order and as what; each of the others is listed with why not."""

import zipfile
from pathlib import Path

import pytest

from longfit.data.files import FoundFile, find_files
from longfit.errors import DataError


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\x00")  # never opened
    return root


def test_folders_come_in_the_order_of_their_parts_whatever_the_file_system_says(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "a/z.jsonl", "a-b/y.CSV", "a/b/x.html", "B.bin", "a/.git/config.txt", "a/state.json")
    found, skipped = find_files(tmp_path)
    assert [(file.name, file.kind) for file in found] == [
        ("a/b/x.html", "html"),
        ("a/z.jsonl", "jsonl"),
        ("a-b/y.CSV", "csv"),
        ("a.txt", "text"),
    ]
    assert found[0].path == tmp_path / "a" / "b" / "x.html"
    assert skipped == [
        ("B.bin", "of unknown kind .bin"),
        ("a/.git/", "hidden folder"),
        ("a/state.json", "metadata of a saved data set"),
    ]
    assert [file.name for file in find_files(tmp_path, ["a", "*.CSV"])[0]] == ["a.txt"]


def test_a_file_named_directly_is_read_whatever_its_extension(tmp_path: Path) -> None:
    write(tmp_path, "notes", "log.old")
    for name in ("notes", "log.old"):
        assert find_files(tmp_path / name) == ([FoundFile(tmp_path / name, name, "text")], [])


def test_members_of_an_archive_are_found_and_encrypted_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("two.txt", "one.md", "deep/inner.zip", "locked.txt"):
            archive.writestr(name, "x")
    content = bytearray(path.read_bytes())
    content[content.rindex(b"locked.txt") - 38] |= 1  # flag bits of the last entry of the central directory
    path.write_bytes(content)
    found, skipped = find_files(path)
    assert found == [FoundFile(path, "b.zip", "archive", (("one.md", "text"), ("two.txt", "text")))]
    assert skipped == [
        ("b.zip!/deep/inner.zip", "archive inside an archive"),
        ("b.zip!/locked.txt", "encrypted"),
    ]
    assert find_files(path, ["*.md"])[0][0].members == (("two.txt", "text"),)


def test_wrong_paths_say_what_is_there_instead(tmp_path: Path) -> None:
    write(tmp_path, "books/one.txt")
    with pytest.raises(DataError, match=r"boks: does not exist; did you mean .*/books\?"):
        find_files(tmp_path / "boks")
    with pytest.raises(DataError, match=r"does not exist; did you mean .*/books\?"):
        find_files(tmp_path / "book" / "one.txt")
    with pytest.raises(DataError, match=r"does not exist \(.*one\.txt is a file\)"):
        find_files(tmp_path / "books" / "one.txt" / "two")
    with pytest.raises(DataError, match="does not exist; give a text file, a table"):
        find_files(tmp_path / "qqqq")


def test_paths_without_anything_to_read_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder is empty"):
        find_files(tmp_path)
    write(tmp_path, "a.odt", "b.bin")
    with pytest.raises(DataError, match=r"nothing readable among 2 files.*convert first, for example: pandoc"):
        find_files(tmp_path)
    with pytest.raises(DataError, match=r"\.odt is not read; convert it first, for example: pandoc"):
        find_files(tmp_path / "a.odt")
