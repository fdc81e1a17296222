"""The file tier: pages of optimiser state in one file that survives being killed at any moment.

    PATH           a page of header (JSON: format, run, page_bytes), then two slots for every page, side by side
    PATH.commit    JSON: the slot of each page that belongs to the last commit, its checksum, and the caller's record

A page is never written over its committed slot. Between commits it goes to the other slot, again and again; ``commit``
forces those slots to the disk, then replaces PATH.commit by a new one in a single rename. So at every moment the file
holds the whole state of the last commit, whatever was being written when the process died; what came after that commit
is gone, and opening the file says so. Before the first commit there is nothing to come back to.

What is guaranteed, precisely: a file opened again with the run's name yields the pages and the record of its last
commit, bit for bit, or raises ``PagingError`` naming the damage. The parameters are not in the file; whoever resumes
must bring those of the same moment, which is why training commits when it writes a checkpoint.

The space of a slot is reserved before anything is written to it, and ``check`` before each step finds the file gone or
cut, so that both show before a step and not in it.

A page is read and written (by the tiers above), or changed where it lies in a mapping (``mapped_frames.py``); both see
the same bytes. A page that is first written in one piece stays in large folios of the kernel, which come and go in a
mapping 30 times faster than single pages of 4 KiB.
"""

import errno
import json
import mmap
import os
import zlib
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from longfit.errors import PagingError
from longfit.files import parts
from longfit.files.lock import try_lock, unlock
from longfit.files.reading import read_text, reading, require_regular
from longfit.files.writing import FULL

_FORMAT = "longfit paged state 1"
_HEADER_BYTES = 4096  # what of the header is read: its page may be of any size

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class PageFile:
    """Pages in a file of one run, opened exclusively.

    Args:
        path: the file; created when missing. One that exists must belong to ``run``.
        run: a name for the run, the same when it is resumed; None makes one up, so that no existing file fits.
        page_bytes: bytes of a page.
    Raises:
        PagingError: the file cannot be created or written, is not ours, is in use, or its commit is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, run: str | None, page_bytes: int) -> None:
        self.path = Path(path).absolute()
        self.run = run if run is not None else os.urandom(8).hex()
        self.page_bytes = page_bytes
        self.record: dict[str, Any] | None = None  # the caller's record of the commit that was found, or last made
        self._commit_path = self.path.with_name(self.path.name + ".commit")
        self._committed: list[int | None] = []  # the slot that belongs to the last commit; None: no such page in it
        self._newest: list[int | None] = []  # the slot written last; None: never written, all zeros
        self._checksums: list[int | None] = []  # of the committed slots
        self._reserved: set[tuple[int, int]] = set()
        if self.path.exists():
            require_regular(self.path, PagingError)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            _explain(error, self.path, "open it")
        try:
            self._lock()
            if os.fstat(self._file).st_size == 0:
                self._write_header()
            else:
                do = "remove it and its .commit, and resume from a checkpoint"
                with reading(self.path, "the optimiser state", PagingError, do=do):
                    self._check_header()
                    self._read_commit()
        except BaseException:
            os.close(self._file)
            raise

    @property
    def num_pages(self) -> int:
        """Pages that have a place in the file."""
        return len(self._newest)

    @property
    def num_bytes(self) -> int:
        """Bytes of the file, up to the end of its last page."""
        return self._offset(self.num_pages, 0)

    def grow(self, num_pages: int) -> None:
        """Make room for pages up to ``num_pages`` and reserve their space on the disk.

        Raises: PagingError: the disk is full; nothing has changed.
        """
        missing = range(self.num_pages, num_pages)
        for page in missing:
            self._reserve(page, 0)
        for pages in (self._committed, self._newest, self._checksums):
            pages.extend([None] * len(missing))
        if missing:
            os.ftruncate(self._file, self._offset(self.num_pages, 0))

    def check(self) -> None:
        """Raise PagingError if the file at the path is no longer the one that was opened."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            there = None
        here = os.fstat(self._file)
        if here.st_size < self._offset(self.num_pages, 0):
            raise PagingError(
                f"{self.path}: the file of this run's optimiser state was cut to {here.st_size} bytes; it needs "
                f"{self._offset(self.num_pages, 0)}. No step was taken, but state is lost: resume from the last "
                "checkpoint with a new file"
            )
        if there is None or (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            raise PagingError(
                f"{self.path}: the file of this run's optimiser state vanished "
                f"({'nothing is there' if there is None else 'another file is there'}); it must stay while the run "
                "lives. No step was taken: state_dict() still reads the whole state; save it and resume with a new file"
            )

    def read(self, page: int, frame: Tensor) -> bool:
        """Fill ``frame`` (uint8 ``[page_bytes]``, CPU) with the newest contents of a page; False if never written."""
        slot = self._newest[page]
        if slot is None:
            return False
        self._read_slot(page, slot, frame)
        return True

    def write(self, page: int, frame: Tensor) -> None:
        """Write a page beside its committed contents. Raises PagingError; the committed contents stay."""
        slot = self._free_slot(page)
        self._reserve(page, slot)
        try:
            parts.write(self._file, self._offset(page, slot), frame.numpy().data)
        except OSError as error:
            _explain(error, self.path, f"write page {page}")
        self._newest[page] = slot

    def open_slot(self, page: int) -> tuple[int, bool]:
        """Make the newest contents of a page, or zeros, ready to be changed where they lie in a mapping of the file.

        Returns: the offset of a slot that holds them and is not the committed one; whether the page was ever written.
        Raises: PagingError: the disk is full or fails; the committed contents stay.
        """
        slot = self._newest[page]
        if slot is None or slot == self._committed[page]:
            frame = torch.zeros(self.page_bytes, dtype=torch.uint8)
            held = self.read(page, frame)
            self.write(page, frame)  # in one piece, which the kernel keeps in one piece
            return self._offset(page, self._free_slot(page)), held
        return self._offset(page, slot), True

    def mapping(self, begin: int, end: int) -> mmap.mmap:
        """Map a part of the file for reading and writing. Raises: OSError: the file system cannot."""
        return mmap.mmap(self._file, end - begin, offset=begin)

    def commit(self, record: dict[str, Any]) -> None:
        """Make what was written the state that a killed run comes back to.

        Args:
            record: JSON data that describes the state; returned as ``record`` when the file is opened again.
        Raises: PagingError: the disk is full or the file vanished; the previous commit stands.
        """
        self.check()
        frame = torch.empty(self.page_bytes, dtype=torch.uint8)
        checksums = list(self._checksums)
        for page, slot in enumerate(self._newest):
            if slot is not None and slot != self._committed[page]:
                self._read_slot(page, slot, frame)
                checksums[page] = zlib.crc32(frame.numpy().data)
                self._reserve(page, 1 - slot)  # the next write goes there: a full disk shows now
        commit = {
            "format": _FORMAT,
            "run": self.run,
            "page_bytes": self.page_bytes,
            "slots": self._newest,
            "checksums": checksums,
            "record": record,
        }
        try:
            os.fsync(self._file)
            _replace(self._commit_path, {"checksum": zlib.crc32(json.dumps(commit).encode()), "commit": commit})
        except OSError as error:
            _explain(error, self._commit_path, "commit the state")
        self._committed, self._checksums, self.record = list(self._newest), checksums, record

    def close(self) -> None:
        """Close the file. A file without a commit is of no use to anyone and is removed."""
        if self._file < 0:
            return
        if self.record is None and self._is_ours():
            self.path.unlink(missing_ok=True)
        unlock(self._file)  # a mapping holds the open file, and its lock, until it is collected
        os.close(self._file)
        self._file = -1

    def remove(self) -> None:
        """Close the file and remove it with its commit; nothing if it is not ours any more."""
        if self._file >= 0 and self._is_ours():
            self.record = None
            self._commit_path.unlink(missing_ok=True)
        self.close()

    def explain(self, error: OSError, action: str) -> NoReturn:
        """Raise the PagingError that names what an operating system error means for this file."""
        _explain(error, self.path, action)

    def _free_slot(self, page: int) -> int:
        return 1 if self._committed[page] == 0 else 0

    def _is_ours(self) -> bool:
        try:
            self.check()
        except PagingError:
            return False
        return True

    def _offset(self, page: int, slot: int) -> int:
        return (1 + 2 * page + slot) * self.page_bytes  # a multiple of it: copies of aligned pages are faster

    def _reserve(self, page: int, slot: int) -> None:
        if (page, slot) in self._reserved:
            return
        try:
            parts.reserve(self._file, self._offset(page, slot), self.page_bytes)
        except OSError as error:
            _explain(error, self.path, f"reserve {self.page_bytes} bytes for page {page}")
        self._reserved.add((page, slot))

    def _read_slot(self, page: int, slot: int, frame: Tensor) -> None:
        try:
            done = parts.read(self._file, self._offset(page, slot), frame.numpy().data)
        except OSError as error:
            _explain(error, self.path, f"read page {page}")
        if done < self.page_bytes:
            raise PagingError(
                f"{self.path}: page {page} ends after {done} of {self.page_bytes} bytes; something truncated the "
                "file. Resume from the last checkpoint with a new file"
            )

    def _lock(self) -> None:
        try:
            locked = try_lock(self._file)
        except OSError:  # a file system without locks: nobody can know
            return
        if not locked:
            raise PagingError(
                f"{self.path}: another process (or another optimiser of this one) is using this file; allowed: one "
                "optimiser per file. Give each process its own path, with its rank in it"
            )

    def _write_header(self) -> None:
        header = json.dumps({"format": _FORMAT, "run": self.run, "page_bytes": self.page_bytes})
        try:
            os.pwrite(self._file, header.encode().ljust(self.page_bytes), 0)
        except OSError as error:
            _explain(error, self.path, "write its header")

    def _check_header(self) -> None:
        try:
            header = json.loads(os.pread(self._file, _HEADER_BYTES, 0))
        except ValueError:
            header = None
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise PagingError(
                f"{self.path}: exists and does not hold optimiser state of longfit; it is left as it is. "
                "Give a path where nothing is"
            )
        if header["run"] != self.run:
            raise PagingError(
                f"{self.path}: holds the optimiser state of run {header['run']!r}; this is run {self.run!r}. "
                f"Resume that run with its name, or remove the file, or give another path"
            )
        if header["page_bytes"] != self.page_bytes:
            raise PagingError(
                f"{self.path}: was written with page_bytes={header['page_bytes']}, got {self.page_bytes}; "
                "resume with that, or with the budget of then, which decides it; or remove the file and its .commit "
                "and load a checkpoint"
            )

    def _read_commit(self) -> None:
        """Adopt the last commit, every page checked; a run that died before its first commit starts empty."""
        if not self._commit_path.exists():
            os.ftruncate(self._file, self._offset(0, 0))
            return
        commit = _load_commit(self._commit_path)
        if (commit["run"], commit["page_bytes"]) != (self.run, self.page_bytes):
            raise PagingError(
                f"{self._commit_path}: belongs to run {commit['run']!r} with page_bytes={commit['page_bytes']}, the "
                f"file beside it to run {self.run!r} with {self.page_bytes}. Remove both and resume from a checkpoint"
            )
        self._committed, self._newest = list(commit["slots"]), list(commit["slots"])
        self._checksums, self.record = commit["checksums"], commit["record"]
        frame = torch.empty(self.page_bytes, dtype=torch.uint8)
        for page, slot in enumerate(self._committed):
            self._reserve(page, 0)
            self._reserve(page, 1)
            if slot is None:
                continue
            self._read_slot(page, slot, frame)
            if zlib.crc32(frame.numpy().data) != self._checksums[page]:
                raise PagingError(
                    f"{self.path}: page {page} of {len(self._committed)} is damaged (its checksum differs from the "
                    "commit's). Remove the file and its .commit, and resume from a checkpoint"
                )


def _load_commit(path: Path) -> dict[str, Any]:
    try:
        envelope = json.loads(
            read_text(path, PagingError, what="the commit record", do="remove it and the file beside it")
        )
        commit: dict[str, Any] = envelope["commit"]
        intact = zlib.crc32(json.dumps(commit).encode()) == envelope["checksum"]
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise PagingError(
            f"{path}: the commit record is damaged (not what was written). "
            "Remove it and the file beside it, and resume from a checkpoint"
        )
    return commit


def _replace(path: Path, content: dict[str, Any]) -> None:
    """Put a JSON file at ``path`` so that a reader sees the old one or the new one, also after a power cut."""
    draft = path.with_name(path.name + ".draft")
    with open(draft, "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _explain(error: OSError, path: Path, action: str) -> NoReturn:
    """Raise the PagingError that names what an operating system error means here, and what to do."""
    if error.errno in FULL:
        why, do = "the disk is full", "free some space or give a path on another disk, then start again"
    elif error.errno in _READ_ONLY:
        why, do = "it may not be written", "give a path that this user may write"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR):
        why, do = "its folder does not exist", f"create {path.parent} or give another path"
    elif error.errno == errno.EFAULT:
        why, do = "the file was cut, or its disk failed", "resume from the last checkpoint with a new file"
    elif error.errno == errno.ENOMEM:
        why, do = "this process may not have so much memory", "lower optim.budget, or raise the limit (ulimit -v)"
    elif error.errno == errno.EISDIR:
        why, do = "it is a folder", "give the path of a file in it"
    else:
        why, do = "the system refused", "look at the disk, then resume from the last checkpoint"
    raise PagingError(f"{path}: could not {action}: {why} ({error.strerror}); {do}") from error
