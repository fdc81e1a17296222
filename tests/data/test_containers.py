"""Compressed files and archives are read as what they hold; damage is named; many members take linear time."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from longfit.data import containers
from longfit.data.documents import read_documents
from longfit.errors import DataError
from longfit.files import expansion

ROWS = b'{"text": "one"}\n{"text": "two"}\n'


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def tar(**files: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name.replace("__", "/").replace("_DOT_", "."))
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_table_is_read_as_the_table(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](ROWS * 5000))
    documents = read_documents(path)
    assert len(documents) == 10_000
    assert [document.text for document in documents][:2] == ["one", "two"]
    path.write_bytes(COMPRESS[suffix](ROWS * 5000)[:-9])
    with pytest.raises(DataError, match=rf"rows\.jsonl\{suffix}: (cannot be read|not a readable|bad JSON)"):
        read_documents(path)


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_a_tar_is_read_in_its_own_order_like_a_folder(suffix: str, tmp_path: Path) -> None:
    data = tar(z_DOT_txt=b"last", a__r_DOT_jsonl=ROWS, pic_DOT_png=b"\x89", b_DOT_txt_DOT_gz=gzip.compress(b"packed"))
    path = tmp_path / f"books.tar{suffix}"
    path.write_bytes(COMPRESS[suffix](data) if suffix else data)
    for place in (path, tmp_path):
        documents = read_documents(place)
        name = path.name
        assert [(document.name, document.text) for document in documents] == [
            (f"{name}!/z.txt", "last"),
            (f"{name}!/a/r.jsonl:1", "one"),
            (f"{name}!/a/r.jsonl:2", "two"),
            (f"{name}!/b.txt.gz", "packed"),
        ]
        assert documents.report.skipped == ((f"{name}!/pic.png", "of unknown kind .png"),)


def test_a_table_that_is_read_from_its_end_may_be_compressed(tmp_path: Path) -> None:
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}]), file)
    with zipfile.ZipFile(tmp_path / "t.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("t.parquet", file.getvalue())
    (tmp_path / "u.parquet.gz").write_bytes(gzip.compress(file.getvalue()))
    assert [document.text for document in read_documents(tmp_path)] == ["a", "a"]


def test_one_damaged_member_does_not_hide_the_others(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("a.txt", b"\x00")
        archive.writestr("b.txt", b"caf\xe9")
        archive.writestr("c.txt", b"fine")
    with pytest.raises(DataError, match=r"(?s)t\.zip!/a\.txt: binary.*t\.zip!/b\.txt: not utf-8"):
        read_documents(tmp_path / "t.zip")
    assert [document.text for document in read_documents(tmp_path / "t.zip", bad_rows="skip")] == ["fine"]


def test_each_member_is_unpacked_once_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for number in range(300):
            archive.writestr(f"{number:04d}.txt", f"text {number}")
    opened: list[str] = []
    real = zipfile.ZipFile.__init__

    def counted(self: zipfile.ZipFile, *args: object, **kwargs: object) -> None:
        opened.append(str(args[0]))
        real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(containers.zipfile.ZipFile, "__init__", counted)
    documents = read_documents(tmp_path / "many.zip")
    assert sum(1 for _ in documents) == 300
    assert len(opened) == 3  # its list, the survey, the reading


@pytest.mark.parametrize(
    "name", ["bomb.zip", "bomb.txt.gz", "bomb.txt.xz", "bomb.txt.bz2", "bomb.txt.zst", "bomb.docx"]
)
def test_what_expands_without_measure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:

    monkeypatch.setattr(expansion, "FREE_BYTES", 1 << 16)
    path, zeros = tmp_path / name, bytes(4 << 20)
    if path.suffix in (".zip", ".docx"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", zeros)
    elif path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(zeros)
    else:
        path.write_bytes({".gz": gzip, ".xz": lzma, ".bz2": bz2}[path.suffix].compress(zeros))
    with pytest.raises(DataError, match=rf"(?s){name}.*unpack to"):
        read_documents(path)


def test_a_tar_that_lost_its_end_or_a_header_is_no_shorter_tar(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text("text of " + name)
            tar.add(tmp_path / name, name)
    whole = path.read_bytes()
    path.write_bytes(whole[:1024])  # a header and a block: the first file, whole
    with pytest.raises(DataError, match=r"t\.tar.*cut short"):
        read_documents(path)
    path.write_bytes(whole[:1024] + b"\x01" + whole[1025:])
    with pytest.raises(DataError, match=r"t\.tar.*damaged"):
        read_documents(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.zip").symlink_to("/dev/zero")
    for name, what in (("pipe.txt", "a named pipe"), ("zero.zip", "a device")):
        with pytest.raises(DataError, match=f"{name}: is {what}"):
            read_documents(tmp_path / name)
    (tmp_path / "a.txt").write_text("a")
    assert [skipped for skipped, _ in read_documents(tmp_path).report.skipped] == ["pipe.txt", "zero.zip"]
