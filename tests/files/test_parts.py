"""Parts of a file, with a system that does less than it is asked to, or has no call to reserve space."""

import os
import sys
from pathlib import Path

import pytest

from longfit.files import parts


@pytest.fixture
def file(tmp_path: Path) -> int:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


def test_a_part_is_written_and_read_whole_however_little_a_call_does(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:3], offset))
    monkeypatch.setattr(os, "preadv", lambda file, into, offset: read(file, [into[0][:2]], offset))
    parts.write(file, 5, memoryview(b"0123456789"))
    found = bytearray(10)
    assert parts.read(file, 5, memoryview(found)) == 10
    assert found == b"0123456789"


def test_where_the_file_ends_fewer_bytes_are_read(file: int) -> None:
    parts.write(file, 0, memoryview(b"0123"))
    found = bytearray(10)
    assert parts.read(file, 2, memoryview(found)) == 2
    assert found == b"23" + bytes(8)


@pytest.mark.parametrize("system", [sys.platform, "darwin"])
def test_a_reserved_part_is_there_and_zero(file: int, system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    parts.reserve(file, 4, 6)
    assert os.fstat(file).st_size == 10
    assert os.pread(file, 10, 0) == bytes(10)
