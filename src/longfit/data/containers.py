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
import lzma
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, cast

from longfit.errors import DataError
from longfit.files.expansion import bounded, require_modest_zip
from longfit.files.reading import reading, require_regular

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
TAR_SHORT = {".tgz": "gzip", ".tbz2": "bz2", ".txz": "xz"}


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
def decompressed(stream: BinaryIO, compression: str | None, num_bytes: int) -> Iterator[BinaryIO]:
    """Open what a compressed stream holds.

    Args:
        num_bytes: of the compressed stream; what it holds may be larger within limits (`expansion.py`).
    """
    if compression is None:
        yield stream
        return
    if compression == "gzip":
        opened: Any = gzip.GzipFile(fileobj=stream)
    elif compression == "bz2":
        opened = bz2.BZ2File(stream)
    elif compression == "xz":
        opened = lzma.LZMAFile(stream)  # noqa: SIM115 (below)
    else:
        import pyarrow  # type: ignore[import-untyped]

        opened = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")
    with opened:
        yield bounded(opened, num_bytes)


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file on disk, decompressed if its ending says so."""
    require_regular(path, DataError)
    with path.open("rb") as raw, decompressed(raw, compression_of(path.name), path.stat().st_size) as stream:
        yield stream


@contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    require_regular(path, DataError)
    with zipfile.ZipFile(path) as archive:
        require_modest_zip(archive, path.stat().st_size)
        yield archive


def list_members(path: Path) -> list[Member]:
    """List the files of an archive, in the order in which `read_members` gives them.

    Raises: DataError: damaged.
    """
    with reading(path, "the archive", DataError, do="pack it again, or give the folder"):
        if archive_kind(path.name) == "zip":
            with _open_zip(path) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
                return [Member(entry.filename, bool(entry.flag_bits & 1)) for entry in sorted(entries, key=_zip_order)]
        with open_file(path) as stream, _tar_files(stream) as (_, files):
            return [Member(entry.name) for entry in files]


def read_members(path: Path, wanted: frozenset[str]) -> Iterator[tuple[str, BinaryIO]]:
    """Open members of an archive one after the other, each to be read before the next is asked for."""
    if archive_kind(path.name) == "zip":
        with _open_zip(path) as archive:
            for entry in sorted(archive.infolist(), key=_zip_order):
                if entry.filename in wanted and not entry.is_dir():
                    with (
                        archive.open(entry) as member,
                        decompressed(cast(BinaryIO, member), compression_of(entry.filename), entry.file_size) as stream,
                    ):
                        yield entry.filename, stream
        return
    with open_file(path) as stream, _tar_files(stream) as (tar, files):
        for item in files:
            if item.name in wanted:
                found = cast(BinaryIO, tar.extractfile(item))
                with decompressed(found, compression_of(item.name), item.size) as opened:
                    yield item.name, opened


class _StrictHeader(tarfile.TarInfo):
    """A header of a tar archive; tarfile takes a damaged one, and the end of the file, for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the mark of its end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it is damaged or cut short at byte {archive.offset:,} ({error})") from None


@contextmanager
def _tar_files(stream: BinaryIO) -> Iterator[tuple[tarfile.TarFile, Iterator[tarfile.TarInfo]]]:
    """Open a tar archive and walk its regular files; one with holes may say that it is of any size, and is refused."""

    def files() -> Iterator[tarfile.TarInfo]:
        for item in tar:
            if item.issparse():
                raise DataError(f"{item.name} is a file with holes; pack it again without them (tar without -S)")
            if item.isfile():
                yield item

    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictHeader) as tar:
        yield tar, files()


def _zip_order(entry: zipfile.ZipInfo) -> list[str]:
    return entry.filename.split("/")
