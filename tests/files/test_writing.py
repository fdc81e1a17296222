"""A folder is replaced without a moment in which a kill loses both; what other systems lack is not used."""

import errno
import os
import shutil
import sys
import types
from contextlib import suppress
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from longfit.errors import ExportError, RunError
from longfit.exporting.result_folder import result_folder
from longfit.files import lock, writing


def fill(text: str):
    return lambda folder: (folder / "a").write_text(text)


@pytest.mark.parametrize("number", range(4))
def test_a_kill_between_any_two_renamings_leaves_the_old_folder_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The process dies at the ``number``-th renaming or removal; the next start sweeps."""
    folder, calls = tmp_path / "best", []
    writing.replace_folder(folder, fill("old"))

    class Killed(BaseException):
        pass

    def dying(real):
        def call(*words: object, **more: object) -> object:
            calls.append(real)
            if len(calls) > number:
                raise Killed
            return real(*words, **more)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dying(Path.rename))
        patched.setattr(writing.shutil, "rmtree", dying(shutil.rmtree))
        with suppress(Killed):
            writing.replace_folder(folder, fill("new"))
    writing.sweep(tmp_path)
    assert (folder / "a").read_text() in ("old", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_lines_are_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    writing.append_lines(path, "one\n")
    real = Path.open

    def short(self: Path, *words: object, **more: object):
        file = real(self, *words, **more)
        return types.SimpleNamespace(
            __enter__=None, seek=file.seek, truncate=file.truncate, write=lambda data: file.write(data[:2]), file=file
        )

    class Short:
        def __init__(self, file: object) -> None:
            self.file = file

        def __enter__(self) -> "Short":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.file.close()

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    monkeypatch.setattr(Path, "open", lambda self, *words, **more: Short(short(self, *words, **more)))
    with pytest.raises(RunError, match=r"m\.jsonl.*disk is full"):
        writing.append_lines(path, "two\n")
    monkeypatch.undo()
    assert path.read_text() == "one\n"


def test_only_what_is_open_for_writing_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows flushes no descriptor that is open for reading, and opens no folder."""
    import fcntl

    def fsync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(writing, "os", types.SimpleNamespace(**{**vars(os), "name": "nt"}))
    writing.replace_folder(tmp_path / "x", fill("new"))
    writing.write_text(tmp_path / "t", "ü\n")
    assert (tmp_path / "t").read_bytes() == "ü\n".encode()  # whatever the code page


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EROFS, "may not be written"),
        (errno.EACCES, "may not be written"),
        (errno.ENOENT, "somebody removed it"),
        (errno.ENOTDIR, "a file is where a folder should be"),
        (errno.ENAMETOOLONG, "too long for this file system"),
    ],
)
def test_each_refusal_of_a_file_system_has_its_reason(tmp_path: Path, number: int, said: str) -> None:
    with pytest.raises(RunError, match=f"plan.*{said}.*; kept"), writing.writing(tmp_path / "plan", then="kept"):
        raise OSError(number, os.strerror(number))


def test_of_a_folder_that_cannot_be_copied_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: str, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()
    with pytest.raises(RunError, match="b: cannot be written: the disk is full"), writing.writing(tmp_path / "b"):
        shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=full)


def test_a_path_that_is_too_long_is_named(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 300)
    with pytest.raises(RunError, match="too long"), writing.writing(path):
        writing.write_text(path, "x")


def test_the_lock_of_windows_is_taken_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub of ``msvcrt``, which locks bytes and refuses them while another has them."""
    held: set[int] = set()

    def locking(descriptor: int, mode: int, count: int) -> None:
        inode = os.fstat(descriptor).st_ino
        if inode in held:
            raise OSError(errno.EACCES, "locked")
        held.add(inode)

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setattr(lock, "sys", types.SimpleNamespace(platform="win32"))
    first = lock.FolderLock(tmp_path).take()
    with pytest.raises(RunError, match="is being written by process"):
        lock.FolderLock(tmp_path).take()
    first.release()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_that_a_library_only_quotes_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        writing.replace_folder(tmp_path / "folder", lambda folder: Tokenizer(BPE()).save("/dev/full"))
    assert caught.value.errno == errno.ENOSPC
    with (
        pytest.raises(ExportError, match="cannot be written: the disk is full"),
        result_folder(tmp_path / "out", needed_bytes=0),
    ):
        Tokenizer(BPE()).save("/dev/full")
    assert not list(tmp_path.iterdir())
