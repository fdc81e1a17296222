"""Compressed files and archives: a stream of their bytes, or of their members, each byte unpacked once a pass.

| ending                                    | is                                                              |
|-------------------------------------------|-----------------------------------------------------------------|
| `.gz .bz2 .xz .zst` behind another ending | that file, compressed                                           |
| `.zip`                                    | an archive, read in the order of its names                      |
| `.tar .tar.gz .tgz .tar.bz2 .tar.xz .tar.zst` | an archive, read in its own order: it unpacks from the start only |

What this is not: it chooses no files (`files.py`), and opens no archive inside an archive.
"""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from longfit.errors import DataError

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
TAR_SHORT = {".tgz": "gzip", ".tbz2": "bz2", ".txz": "xz"}
DAMAGED = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, NotImplementedError)


class Member(NamedTuple):
    """One file in an archive."""

    name: str
    is_encrypted: bool = False


def compression_of(name: str) -> str | None:
    """The compression that a file's ending tells of."""
    suffix = Path(name).suffix.lower()
    return COMPRESSED.get(suffix, TAR_SHORT.get(suffix))


def inner_name(name: str) -> str:
    """A file's name without the ending of its compression."""
    path = Path(name)
    if path.suffix.lower() in TAR_SHORT:
        return str(path.with_suffix(".tar"))
    return str(path.with_suffix("")) if path.suffix.lower() in COMPRESSED else name


def archive_kind(name: str) -> str | None:
    """``"zip"`` or ``"tar"``; None for other files."""
    return {".zip": "zip", ".tar": "tar"}.get(Path(inner_name(name)).suffix.lower())


@contextmanager
def decompressed(stream: BinaryIO, compression: str | None) -> Iterator[BinaryIO]:
    """Open what a compressed stream holds."""
    if compression is None:
        yield stream
    elif compression == "gzip":
        with gzip.GzipFile(fileobj=stream) as opened:
            yield cast(BinaryIO, opened)
    elif compression == "bz2":
        with bz2.BZ2File(stream) as opened_bz2:
            yield cast(BinaryIO, opened_bz2)
    elif compression == "xz":
        with lzma.LZMAFile(stream) as opened_xz:
            yield cast(BinaryIO, opened_xz)
    else:
        import pyarrow  # type: ignore[import-untyped]

        with pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd") as opened_zstd:
            yield cast(BinaryIO, io.BufferedReader(_Blocks(opened_zstd), 1 << 20))


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file on disk, decompressed if its ending says so."""
    with path.open("rb") as raw, decompressed(raw, compression_of(path.name)) as stream:
        yield stream


def list_members(path: Path) -> list[Member]:
    """List the files of an archive, in the order in which `read_members` gives them.

    Raises: DataError: damaged.
    """
    kind = archive_kind(path.name)
    try:
        if kind == "zip":
            with zipfile.ZipFile(path) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
                return [Member(entry.filename, bool(entry.flag_bits & 1)) for entry in sorted(entries, key=_zip_order)]
        with open_file(path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            return [Member(entry.name) for entry in tar if entry.isfile()]
    except DAMAGED as error:
        raise DataError(f"{path}: not a readable {kind} archive: {error}") from None


def read_members(path: Path, wanted: frozenset[str]) -> Iterator[tuple[str, BinaryIO]]:
    """Open members of an archive one after the other, each to be read before the next is asked for."""
    if archive_kind(path.name) == "zip":
        with zipfile.ZipFile(path) as archive:
            for entry in sorted(archive.infolist(), key=_zip_order):
                if entry.filename in wanted and not entry.is_dir():
                    with (
                        archive.open(entry) as member,
                        decompressed(cast(BinaryIO, member), compression_of(entry.filename)) as stream,
                    ):
                        yield entry.filename, stream
        return
    with open_file(path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for item in tar:
            if item.name in wanted and item.isfile():
                found = cast(BinaryIO, tar.extractfile(item))
                with decompressed(found, compression_of(item.name)) as opened:
                    yield item.name, opened


def _zip_order(entry: zipfile.ZipInfo) -> list[str]:
    return entry.filename.split("/")


class _Blocks(io.RawIOBase):
    """What Python's buffered reader needs of a stream that only reads blocks."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
