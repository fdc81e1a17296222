"""Frames of host memory that are the pages of the file itself: nothing is copied between the two.

A page that is read into a frame and written back is copied twice in each step, and the second copy waits for the
file's lock. Here the file is mapped once, and a frame is its page's slot in the mapping: the update changes it where it
lies. ``enter`` asks the kernel to put the page into the process (from the disk, if it is not in memory), ``leave`` to
take it out; only what has entered counts as the process's memory, so a budget holds as with frames of its own.

For 4 MiB pages that the kernel holds in large folios, as ext4 and xfs give to a file that is written in large pieces,
entering and leaving costs 30 microseconds per MiB, a read and a write 110.

What a mapping is feared for is a signal where a write would have raised an error. Three things are in the way of that:
the space is reserved and written once before it is mapped, so a full disk has shown already; ``PageFile.check`` finds
a cut file before each step; and a page enters by a call that returns an error where touching it would raise a signal.
What is left is a file that is cut, or a disk that fails, within the milliseconds between a page's entering and its
update: then the process dies, as if killed, and the file comes back to its last commit (``page_file.py``).

Not for accelerators, whose copies want pinned memory, and only where the system has the call (Linux, since 5.14).
"""

import ctypes
import mmap
import os
import sys

import torch
from torch import Tensor

from longfit.files.memory_advice import madvise
from longfit.optim.page_file import PageFile

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of linux/mman.h; Python 3.11 has no name for it


class MappedFrames:
    """Frames on a file's own pages; to a ``PageCache`` they are like ``Frames`` over the file.

    Args:
        file: it holds the pages.
    """

    can_leave = True
    in_file = True

    def __init__(self, file: PageFile) -> None:
        self.page_bytes = file.page_bytes
        self._file = file
        self._parts: list[Tensor] = []  # the mapped file, uint8; a part for each time it has grown
        self._mapped_bytes = 0
        self._frames: dict[int, Tensor] = {}  # offset in the file -> uint8 [page_bytes]
        self._madvise = madvise()

    def enter(self, page: int) -> tuple[Tensor, bool]:
        """Return the page's place in the file, and whether it had contents: a new page starts with zeros."""
        offset, held = self._file.open_slot(page)
        frame = self._frame(offset)
        try:
            self._populate(frame)
        except OSError as error:
            self._file.explain(error, f"bring in page {page}")
        return frame, held

    def store(self, page: int, frame: Tensor) -> None:
        """The page is in the file already."""

    def leave(self, page: int, frame: Tensor) -> None:
        """Take the page out of the process's memory; the file keeps it."""
        self._madvise(frame.data_ptr(), self.page_bytes, mmap.MADV_DONTNEED)

    def note_use(self, page: int) -> None:
        """Work on host memory is done when the call returns."""

    def release(self) -> None:
        """Pages that left hold no memory."""

    def _populate(self, frame: Tensor) -> None:
        if self._madvise(frame.data_ptr(), self.page_bytes, _POPULATE_WRITE):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def _frame(self, offset: int) -> Tensor:
        if offset not in self._frames:
            self._map_until(offset + self.page_bytes)
            begin = 0
            for part in self._parts:
                if offset < begin + part.numel():
                    break
                begin += part.numel()
            self._frames[offset] = part[offset - begin : offset - begin + self.page_bytes]
        return self._frames[offset]

    def _map_until(self, end: int) -> None:
        if end > self._mapped_bytes:
            try:
                part = self._file.mapping(self._mapped_bytes, self._file.num_bytes)
            except OSError as error:
                self._file.explain(error, "map its pages")
            self._parts.append(torch.frombuffer(part, dtype=torch.uint8))
            self._mapped_bytes += len(part)


def can_map(file: PageFile) -> bool:
    """Whether this system and the file's file system can put pages of it into a process, tried on its header."""
    if sys.platform != "linux":
        return False
    try:
        header = torch.frombuffer(file.mapping(0, mmap.PAGESIZE), dtype=torch.uint8)
    except OSError:
        return False
    return madvise()(header.data_ptr(), mmap.PAGESIZE, _POPULATE_WRITE) == 0
