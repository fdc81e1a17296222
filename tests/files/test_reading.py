"""Whatever goes wrong below becomes one error that names the file; what is no regular file is not opened."""

import os
from pathlib import Path

import pytest

from longfit.errors import DataError, ModelError
from longfit.files.reading import read_object, reading, require_regular


class PanicError(BaseException):
    """As Rust's panics come to Python."""


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (KeyError("shape"), "KeyError: 'shape'"),
        (ZeroDivisionError("division by zero"), "division by zero"),
        (RecursionError("maximum recursion depth"), "nested too deeply"),
        (MemoryError(), "more memory than there is"),
        (PanicError("no entry found for key"), "no entry found for key"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (ValueError("1 error:\n  the second line\nthird"), "1 error: the second line"),
        (ValueError(), "ValueError"),
    ],
)
def test_every_exception_becomes_ours(problem: BaseException, told: str) -> None:
    with (
        pytest.raises(ModelError, match="folder/x: the thing cannot be read") as caught,
        reading("folder/x", "the thing", ModelError, do="throw it away"),
    ):
        raise problem
    assert told in str(caught.value)
    assert str(caught.value).endswith("; throw it away")
    assert caught.value.__cause__ is problem


def test_our_own_errors_keep_their_kind_and_gain_the_name() -> None:
    with pytest.raises(DataError, match=r"^x: no rows$"), reading("x", "it", ModelError):
        raise DataError("no rows")
    with pytest.raises(DataError, match=r"^x: no rows$"), reading("x", "it", ModelError):
        raise DataError("x: no rows")


def test_an_interruption_passes() -> None:
    with pytest.raises(KeyboardInterrupt), reading("x", "it", ModelError):
        raise KeyboardInterrupt


def test_only_regular_files_of_their_size_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, told in (
        (Path("/dev/zero"), "a device"),
        (tmp_path / "pipe", "a named pipe"),
        (tmp_path, "a folder"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "a\0b", "cannot be read"),
    ):
        with pytest.raises(ModelError, match=told):
            require_regular(path, ModelError)
    (tmp_path / "file").write_bytes(bytes(11))
    require_regular(tmp_path / "file", ModelError, largest_bytes=11)
    with pytest.raises(ModelError, match="has 11 bytes; allowed are 10"):
        require_regular(tmp_path / "file", ModelError, largest_bytes=10)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"3", b"[" * 100_000, b'{"a": }', b"\0"])
def test_anything_but_an_object_is_named(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    with pytest.raises(ModelError, match=r"x\.json: the configuration"):
        read_object(path, ModelError, what="the configuration")
