"""The border for what goes out: a file is written whole or not at all, and its failure says which file and why.

A file is written under a hidden name beside its place, forced to the disk and renamed; the rename is forced too. A kill
leaves the old file or the new one, and perhaps a hidden ``.NAME.unfinished``, which the next start sweeps away.
"""

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longfit.errors import LongfitError, RunError
from longfit.files.reading import require_regular

UNFINISHED, REMOVED, REPLACED = ".unfinished", ".removed", ".replaced"
LEFTOVERS = (UNFINISHED, REMOVED, REPLACED)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def writing(path: Path, *, error: type[LongfitError] = RunError, then: str = "") -> Iterator[None]:
    """Turn what an operating system refuses into ``error``, with the place, the reason and what to do.

    Args:
        path: what is being written.
        then: what was kept and how to go on, told at the end.
    """
    try:
        yield
    except OSError as problem:
        raise error(f"{path}: cannot be written: {why(problem)}{'; ' * bool(then)}{then}") from problem


@contextmanager
def refusals() -> Iterator[None]:
    """Let what the system refused be an OSError, where a library in Rust (safetensors, tokenizers) only quotes it."""
    try:
        yield
    except (LongfitError, OSError):
        raise
    except Exception as problem:  # of the tokenizers it is no other class
        found = re.search(r"\(os error (\d+)\)", str(problem))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from problem


def why(problem: OSError) -> str:
    """Say what an error of the file system means, and what to do about it."""
    if isinstance(problem, shutil.Error) and (number := re.search(r"\[Errno (\d+)\]", str(problem))):
        return why(OSError(int(number[1]), os.strerror(int(number[1]))))  # of a folder: a list of what each file met
    if problem.errno in FULL:
        return "the disk is full (or a quota is reached): free some space"
    if problem.errno in READ_ONLY:
        return "this place may not be written: give one that this user may write"
    if problem.errno == errno.ENOENT:
        return "its folder is gone: somebody removed it"
    if problem.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return "a file is where a folder should be, or a folder where a file: move it away"
    if problem.errno == errno.ENAMETOOLONG:
        return "its path is too long for this file system: give a shorter one"
    return (problem.strerror or str(problem)) + ": look at the disk"


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing; the folder must be there.

    Raises: OSError: the file system refuses; the old file, if there is one, stays.
    """
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()  # from Python's buffer, which the descriptor knows nothing of
            flush(file.fileno())
        unfinished.replace(path)
    except OSError:
        _forget(unfinished)
        raise
    flush_folder(path.parent)


def append_lines(path: Path, text: str) -> None:
    """Add whole lines to the end of a file, or nothing, and hand them to the operating system.

    Raises: RunError: they cannot be written; the lines before them stay whole.
    """
    data = text.encode()
    if path.exists():
        require_regular(path, RunError)  # to open a pipe would wait for a reader
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.seek(0, 2)
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                file.truncate(before)
            raise


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new folder, and put it in the place of the old one when it is whole and on the disk.

    Raises: OSError: the file system refuses; what ``write`` raises. The old folder, if there is one, stays.
    """
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        with refusals():
            write(unfinished)
        flush_tree(unfinished)
        _exchange(folder, unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    flush_folder(folder.parent)


def _exchange(folder: Path, new: Path) -> None:
    """Give the new folder the old one's name; after a kill between the two renamings `sweep` undoes the first."""
    replaced = folder.with_name(f".{folder.name}{REPLACED}")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    try:
        new.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder; first it loses its name, so that a kill halfway leaves no half folder under it."""
    if not folder.exists():
        return
    hidden = folder.with_name(f".{folder.name.lstrip('.')}{REMOVED}")
    if hidden.exists():
        shutil.rmtree(hidden)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def sweep(folder: Path) -> list[Path]:
    """Remove what killed processes left unfinished or half removed directly in a folder; put back what was replaced.

    Call it only while the folder is locked: another process may be writing. Returns: what was removed.
    """
    for path in folder.glob(f".*{REPLACED}"):
        place = path.with_name(path.name[1:].removesuffix(REPLACED))
        if not place.exists():
            path.rename(place)
    found = [path for path in folder.glob(".*") if path.name.endswith(LEFTOVERS)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            _forget(path)
    return found


def flush(descriptor: int) -> None:
    """Wait until a file that is open for writing is on the disk.

    On macOS ``fsync`` ends when the disk has the bytes in its cache; ``F_FULLFSYNC``, where the file system knows it,
    when they are written.
    """
    if sys.platform == "darwin":
        import fcntl

        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def flush_tree(folder: Path) -> None:
    """Wait until every file below the folder is on the disk: a rename may reach it before the bytes do."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("r+b") as file:  # Windows flushes only what is open for writing
                flush(file.fileno())
    for path in sorted(path for path in (folder, *folder.rglob("*")) if path.is_dir()):
        flush_folder(path)


def flush_folder(folder: Path) -> None:
    """Wait until names in a folder are on the disk, where the system can open a folder (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call
            raise
    finally:
        os.close(descriptor)


def _forget(path: Path) -> None:
    with suppress(OSError):  # what failed before is told; this is only tidying
        path.unlink(missing_ok=True)
