"""Frames in the file: what a page finds when it enters, what a budget costs, and what is not touched."""

import errno
import fcntl
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longfit.errors import PagingError
from longfit.optim.mapped_frames import MappedFrames, can_map
from longfit.optim.page_file import PageFile
from longfit.optim.paging import PageCache

PAGE_BYTES = 65_536

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux puts pages of a mapping into a process on demand"
)


@pytest.fixture
def file(tmp_path: Path) -> PageFile:
    file = PageFile(tmp_path / "pages", run="mine", page_bytes=PAGE_BYTES)
    file.grow(4)
    return file


def in_file(file: PageFile, page: int) -> list[int]:
    """The bytes a page has in the file, as a system call sees them."""
    frame = torch.empty(PAGE_BYTES, dtype=torch.uint8)
    assert file.read(page, frame)
    return frame.unique().tolist()


def killed(file: PageFile) -> None:
    """Do what a kill does to the file: nothing of this process's memory reaches it any more, nor does its lock stay."""
    fcntl.flock(file._file, fcntl.LOCK_UN)
    os.close(file._file)


def resident_pages(frame: Tensor) -> int:
    """Pages of 4 KiB of a frame that are in this process's memory, as Linux counts them."""
    entries = os.open("/proc/self/pagemap", os.O_RDONLY)
    numbers = os.pread(entries, 8 * (PAGE_BYTES // 4096), frame.data_ptr() // 4096 * 8)
    os.close(entries)
    return sum(int.from_bytes(numbers[at : at + 8], "little") >> 63 for at in range(0, len(numbers), 8))


def test_a_page_is_changed_where_it_lies(file: PageFile) -> None:
    frames = MappedFrames(file)
    frame, held = frames.enter(1)
    assert not held
    assert not frame.any(), "a new page is zeros"
    frame.fill_(7)
    assert in_file(file, 1) == [7]
    frames.leave(1, frame)
    again, held = frames.enter(1)
    assert held
    assert again is frame, "so that what was derived from it can be kept"
    assert again.unique().tolist() == [7]


def test_only_what_has_entered_is_the_processs_memory(file: PageFile) -> None:
    frames = MappedFrames(file)
    frame, _ = frames.enter(2)
    assert resident_pages(frame) == PAGE_BYTES // 4096
    frames.leave(2, frame)
    assert resident_pages(frame) == 0


def test_committed_contents_are_not_touched(file: PageFile) -> None:
    cache = PageCache(MappedFrames(file), capacity=2)

    def write(value: int) -> None:
        for batch in cache.sweep(range(4)):
            for page, frame in batch:
                frame.fill_(value + page)

    write(10)
    write(20)
    file.commit({})
    cache.let_go_of_committed()
    write(30)
    assert [in_file(file, page) for page in range(4)] == [[30], [31], [32], [33]]
    killed(file)

    file = PageFile(file.path, run="mine", page_bytes=PAGE_BYTES)
    assert [in_file(file, page) for page in range(4)] == [[20], [21], [22], [23]]
    frame, held = MappedFrames(file).enter(3)
    assert held
    assert frame.unique().tolist() == [23]


def test_a_new_page_is_zeros_even_where_a_killed_run_wrote(file: PageFile) -> None:
    file.commit({})
    frame, _ = MappedFrames(file).enter(0)
    frame.fill_(9)
    killed(file)
    file = PageFile(file.path, run="mine", page_bytes=PAGE_BYTES)
    frame, held = MappedFrames(file).enter(0)
    assert not held
    assert not frame.any()


def test_pages_that_are_added_later(file: PageFile) -> None:
    frames = MappedFrames(file)
    frames.enter(3)[0].fill_(3)
    file.grow(6)
    frames.enter(5)[0].fill_(5)
    frames.enter(4)[0].fill_(4)
    assert [in_file(file, page) for page in (3, 4, 5)] == [[3], [4], [5]]


def test_a_file_that_was_cut_raises_an_error_and_no_signal(file: PageFile) -> None:
    frames = MappedFrames(file)
    frame, _ = frames.enter(2)
    frames.leave(2, frame)
    os.truncate(file.path, 3 * PAGE_BYTES)
    with pytest.raises(PagingError, match=r"could not bring in page 2: .*cut.*; resume from the last checkpoint"):
        frames.enter(2)


def test_a_file_system_that_cannot_map_is_noticed(file: PageFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_map(file)

    def refuse(begin: int, end: int) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(file, "mapping", refuse)
    assert not can_map(file)


def test_a_limit_on_the_address_space_is_named(file: PageFile) -> None:
    import resource

    frames, before = MappedFrames(file), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, before[1]))
    try:
        with pytest.raises(PagingError, match="could not map its pages: this process may not have so much memory"):
            frames.enter(0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
