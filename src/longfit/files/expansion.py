"""What a file may ask for: a few kilobytes must not become a disk full, a gigabyte in memory, nor an hour.

Text and tables compress to a tenth, repetitive ones to a hundredth; deflate ends at a thousandth, newer methods
nowhere. What stays small is let through however dense it was.
"""

import io
import time
import zipfile
from typing import Any, BinaryIO

from longfit.errors import DataError
from longfit.words import format_bytes

MOST_TIMES = 250
FREE_BYTES = 64 << 20


def most_bytes(compressed_bytes: int) -> int:
    """Return the bytes that a compressed file of a size may become."""
    return max(FREE_BYTES, MOST_TIMES * compressed_bytes)


def require_modest_zip(archive: zipfile.ZipFile, archive_bytes: int) -> None:
    """Raise DataError if the members of a zip archive together, by its own list, are larger than they may be.

    What the list says is true: zipfile reads no more of a member.
    """
    require_modest(sum(entry.file_size for entry in archive.infolist()), archive_bytes)


def require_modest(
    expanded_bytes: int, compressed_bytes: int, *, do: str = "unpack it yourself, and give the folder"
) -> None:
    """Raise DataError if so many bytes may not come out of so few.

    Args:
        do: what to advise.
    """
    if expanded_bytes > most_bytes(compressed_bytes):
        raise DataError(
            f"{format_bytes(compressed_bytes)} unpack to {format_bytes(expanded_bytes)} or more; allowed are "
            f"{format_bytes(most_bytes(compressed_bytes))}: {do}"
        )


class ProcessorTime:
    """The time that a document may take: pages may share a text, and what is never closed is looked for time and again.

    Args:
        num_bytes: of the document.
        least_s, s_per_mib: seconds of a processor; several times what the slowest sound document takes.
    """

    def __init__(self, num_bytes: int, *, least_s: float, s_per_mib: float) -> None:
        self._num_bytes, self._most_s = num_bytes, least_s + s_per_mib * num_bytes / 2**20
        self._end = time.thread_time() + self._most_s

    def check(self) -> None:
        """Raise DataError if the time is over."""
        if time.thread_time() > self._end:
            raise DataError(
                f"takes more than {self._most_s:.0f} s of a processor, out of proportion to its {self._num_bytes:,} "
                "bytes; save its text, and give that, or leave it out with data.exclude"
            )


def bounded(stream: BinaryIO, compressed_bytes: int) -> BinaryIO:
    """Read a stream that unpacks ``compressed_bytes``, up to what they may become."""
    return io.BufferedReader(_Bounded(stream, compressed_bytes), 1 << 20)


class _Bounded(io.RawIOBase):
    """Counts what is read; also what Python's buffered reader needs of a stream that only reads blocks."""

    def __init__(self, stream: BinaryIO, compressed_bytes: int) -> None:
        self._stream, self._compressed_bytes, self._bytes = stream, compressed_bytes, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._bytes += len(data)
        require_modest(self._bytes, self._compressed_bytes)
        buffer[: len(data)] = data
        return len(data)
