"""The border for what comes in: whatever goes wrong below while a file is read becomes one error that names the file.

Other libraries fail in their own ways: a truncated download is a SafetensorError, a KeyError, a struct.error, a
RecursionError, or a panic of Rust, which is not even an Exception. Whoever reads a kind of file enters `reading` once
around the whole of it, so that no list of exceptions has to be complete.

Only regular files are opened: a device or a pipe may never end, or never begin. And a file that is read whole is no
larger than its kind can be.
"""

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from longfit.errors import LongfitError

NOT_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit)
LARGEST_CONFIG_BYTES = 64 << 20  # the largest config.json and tokenizer_config.json known are below 10 MB


@contextmanager
def reading(
    name: str | PathLike[str], what: str, error: type[LongfitError], *, do: str = "fetch it again"
) -> Iterator[None]:
    """Turn anything that goes wrong inside into ``error``, with file, reason and way out.

    An error of ours passes as it is, once it names the file.

    Args:
        name: the file or folder as the user knows it.
        what: the kind of thing it should be, as "the tokenizer".
        error: the kind of error.
        do: what the user can do about it.
    Raises: error: for every exception, those of other languages included; not for an interruption.
    """
    try:
        yield
    except LongfitError as problem:
        if str(name) in str(problem):
            raise
        raise type(problem)(f"{name}: {problem}") from problem
    except NOT_OURS:
        raise
    except BaseException as problem:  # the tokenizers' PanicException is one
        raise error(f"{name}: {what} cannot be read: {reason(problem)}; {do}") from problem


def reason(problem: BaseException) -> str:
    """Say in one line what an exception says, with its kind where its text alone means nothing."""
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    if isinstance(problem, RecursionError):
        return "it is nested too deeply"
    if isinstance(problem, MemoryError):
        return "it asks for more memory than there is"
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    kind = type(problem).__name__
    if not lines:
        return kind
    if isinstance(problem, LookupError | TypeError | AttributeError | AssertionError):
        return f"{kind}: {lines[0]}"
    # A pydantic-like report says in its first line that there is one, and in the second which.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def require_regular(path: Path, error: type[LongfitError], *, largest_bytes: int | None = None) -> None:
    """Raise ``error`` unless the path is a regular file, and no larger than it may be."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise error(f"{path}: does not exist; give a file that is there") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL byte in the name
        raise error(f"{path}: cannot be read: {reason(problem)}; give a file that can be read") from problem
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: is {_kind(found.st_mode)}, not a regular file; copy its content into a file")
    if largest_bytes is not None and found.st_size > largest_bytes:
        raise error(f"{path}: has {found.st_size:,} bytes; allowed are {largest_bytes:,}: it is not what its name says")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")


def read_text(
    path: Path, error: type[LongfitError], *, what: str, do: str, largest_bytes: int = LARGEST_CONFIG_BYTES
) -> str:
    """Read a small UTF-8 text whole.

    Raises: error: not a regular file, too large, unreadable, or not UTF-8.
    """
    require_regular(path, error, largest_bytes=largest_bytes)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: {what} is not text: byte {problem.start:,} is not UTF-8; {do}") from problem
    except OSError as problem:
        raise error(f"{path}: {what} cannot be read: {reason(problem)}; {do}") from problem


def read_object(path: Path, error: type[LongfitError], *, what: str, do: str = "fetch it again") -> dict[str, Any]:
    """Read a JSON object.

    Raises: error: as `read_text`, or not JSON, nested too deeply, or not an object.
    """
    text = read_text(path, error, what=what, do=do)
    with reading(path, what, error, do=do):
        value = json.loads(text)
    if not isinstance(value, dict):
        raise error(f"{path}: {what} must be a JSON object, got {type(value).__name__}; {do}")
    return value
