"""One process writes into a folder: whoever wants to holds its lock, and the lock dies with the process.

The lock is the operating system's (``flock``, or Windows' byte-range lock) on a hidden file, so that none is ever left
behind by a killed process: a file that nobody locks means nothing. Its text says who holds it, for the message.

A network file system may not pass locks on to other machines, and some know none at all. There the lock holds among the
processes of one machine at best; `FolderLock.doubt` says so, and names the machine that wrote last.
"""

import errno
import json
import os
import socket
import stat
import sys
from contextlib import suppress
from pathlib import Path

from longfit.errors import RunError

NAME = ".lock"
NETWORK_FILE_SYSTEMS = frozenset(
    "nfs nfs4 cifs smb3 smbfs lustre beegfs ceph gpfs glusterfs 9p afs fuse.sshfs fuse.glusterfs fuse.s3fs".split()  # noqa: SIM905
)
WINDOWS_LOCK_OFFSET = 1 << 20
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process; False if another has it.

    Raises: OSError: the file system knows no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, WINDOWS_LOCK_OFFSET, os.SEEK_SET)  # Windows lets nobody read a locked byte
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise
        return False
    return True


def unlock(descriptor: int) -> None:
    """Let go of a lock: closing its file is not enough where a mapping holds it open."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)


class FolderLock:
    """The lock on a folder, from `take` to `release`.

    Attributes:
        doubt: why another machine might write all the same; None where that cannot be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.doubt: str | None = None
        self._path = folder / NAME
        self._file = -1

    def take(self) -> "FolderLock":
        """Lock the folder, which must exist.

        Raises: RunError: another process has it, or something else is in its place. OSError: the file system refuses
            the file.
        """
        while True:
            file = _open(self._path)
            last = _holder(file)
            try:
                if not try_lock(file):
                    os.close(file)
                    raise RunError(
                        f"{self.folder}: is being written by {last}; wait for it, stop it, or choose another --run-dir"
                    )
            except OSError:
                self.doubt = (
                    f"{self.folder}: this file system has no locks: make sure that no other process writes there"
                )
            if _is_same(file, self._path):
                break
            os.close(file)  # its last holder has just removed it
        elsewhere = _file_system(self.folder)
        if self.doubt is None and elsewhere in NETWORK_FILE_SYSTEMS and last.host not in ("", socket.gethostname()):
            self.doubt = (
                f"{self.folder}: is on {elsewhere}, where a lock of another machine may not be seen; {last} wrote "
                "last: make sure that it is gone"
            )
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        self._file = file
        return self

    def release(self) -> None:
        """Remove the lock's file and let go of it."""
        if self._file < 0:
            return
        with suppress(OSError):  # the folder has gone, or may not be written: the lock goes with the open file
            if _is_same(self._file, self._path):
                self._path.unlink()
        unlock(self._file)
        os.close(self._file)
        self._file = -1


def _open(path: Path) -> int:
    """Open a lock's file; what a link leads to is not ours to write, and a pipe would be waited for."""
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"):  # Windows has none of them
        flags |= getattr(os, name, 0)
    try:
        file = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise RunError(f"{path}: is no regular file; remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise RunError(f"{path}: is no regular file; remove it")
    return file


class _Holder:
    """Who wrote a lock's file."""

    def __init__(self, pid: object = None, host: object = "") -> None:
        self.pid, self.host = pid, str(host)

    def __str__(self) -> str:
        if self.pid is None:
            return "another process"
        return f"process {self.pid}" + (f" on {self.host}" if self.host != socket.gethostname() else "")


def _holder(file: int) -> _Holder:
    try:
        found = json.loads(os.read(file, 1000))
        return _Holder(found["pid"], found["host"])
    except (ValueError, KeyError, TypeError, OSError):
        return _Holder()


def _is_same(file: int, path: Path) -> bool:
    try:
        there, here = path.stat(), os.fstat(file)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder is on; empty where that cannot be told."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    place, best = str(folder.resolve()), ("", "")
    for line in mounts:
        parts = line.split()
        if len(parts) < 3:
            continue
        point = parts[1].encode().decode("unicode_escape", errors="replace")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, parts[2])
    return best[1]
