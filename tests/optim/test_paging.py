"""The page cache: budget, order of eviction, contents through any number of tiers, failure without loss."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longfit.errors import ConfigError, PagingError
from longfit.optim.frames import Frames
from longfit.optim.page_file import PageFile
from longfit.optim.paging import PageCache

CPU = torch.device("cpu")
PAGE_BYTES = 4096


class Notebook:
    """A tier that keeps pages and notes what is asked of it; ``full`` makes it refuse to write."""

    def __init__(self) -> None:
        self.pages: dict[int, Tensor] = {}
        self.notes: list[str] = []
        self.full = False

    def read(self, page: int, frame: Tensor) -> bool:
        if page in self.pages:
            frame.copy_(self.pages[page])
            self.notes.append(f"read {page}")
        return page in self.pages

    def write(self, page: int, frame: Tensor) -> None:
        if self.full:
            raise PagingError("full")
        self.pages[page] = frame.clone()
        self.notes.append(f"write {page}")


def cache_over(below: Notebook | PageFile | PageCache | None, capacity: int | None) -> PageCache:
    return PageCache(Frames(CPU, page_bytes=PAGE_BYTES, below=below), capacity=capacity)


def add_one(cache: PageCache, pages: range) -> Iterator[int]:
    """Add 1 to every byte of every page; yields the pages in their order."""
    for batch in cache.sweep(pages):
        for page, frame in batch:
            frame += 1
            yield page


def contents(cache: PageCache, pages: range) -> list[list[int]]:
    found = {}
    for batch in cache.sweep(pages, change=False):
        found.update({page: frame.unique().tolist() for page, frame in batch})
    return [found[page] for page in pages]


@pytest.mark.parametrize("capacity", [2, 3, 5, 9, 10, 50, None])
def test_every_page_is_swept_once_and_keeps_its_contents(capacity: int | None) -> None:
    cache, pages = cache_over(Notebook(), capacity), range(10)
    for _ in range(4):
        assert sorted(add_one(cache, pages)) == list(pages)
        assert cache.resident_bytes <= (capacity or 10) * PAGE_BYTES
    assert contents(cache, pages) == [[4]] * 10


def test_what_the_budget_holds_is_never_moved() -> None:
    below, pages = Notebook(), range(10)
    cache = cache_over(below, 4)
    for _ in range(3):
        list(add_one(cache, pages))
    below.notes.clear()
    moved = cache.moved_bytes
    list(add_one(cache, pages))
    # Ten pages through four frames: six must be fetched, whatever the policy; the two that may be on their way at once
    # can each cost a page that would have been needed again.
    assert 6 <= sum(note.startswith("read") for note in below.notes) <= 8
    assert cache.moved_bytes - moved == len(below.notes) * PAGE_BYTES
    assert cache.moved_s > 0


def test_pages_that_a_sweep_does_not_need_leave_first() -> None:
    below = Notebook()
    cache = cache_over(below, 4)
    list(add_one(cache, range(0, 3)))
    list(add_one(cache, range(5, 9)))
    below.notes.clear()
    list(add_one(cache, range(5, 9)))
    assert below.notes == [], "the four pages in use have pushed out the three that are not"


def test_unchanged_pages_are_not_written_again() -> None:
    below = Notebook()
    cache = cache_over(below, 2)
    list(add_one(cache, range(6)))
    cache.flush()
    below.notes.clear()
    assert contents(cache, range(6)) == [[1]] * 6
    assert not [note for note in below.notes if note.startswith("write")]


def test_pages_that_are_here_come_in_one_batch() -> None:
    everything = cache_over(None, None)
    list(add_one(everything, range(7)))
    assert [len(batch) for batch in everything.sweep(range(7))] == [7]
    some = cache_over(Notebook(), 4)
    list(add_one(some, range(7)))
    assert max(len(batch) for batch in some.sweep(range(7))) > 1


def test_tiers_stack(tmp_path: Path) -> None:
    file = PageFile(tmp_path / "pages", run=None, page_bytes=PAGE_BYTES)
    file.grow(12)
    host = cache_over(file, 5)
    top, pages = cache_over(host, 2), range(12)
    for _ in range(3):
        list(add_one(top, pages))
    assert contents(top, pages) == [[3]] * 12
    assert host.resident_bytes <= 5 * PAGE_BYTES
    top.flush()
    host.flush()
    frame = torch.empty(PAGE_BYTES, dtype=torch.uint8)
    for page in pages:
        assert file.read(page, frame)
        assert frame.unique().tolist() == [3]
    file.close()


def test_evict_releases_everything_and_loses_nothing() -> None:
    cache, pages = cache_over(Notebook(), None), range(5)
    list(add_one(cache, pages))
    assert cache.evict() == 5 * PAGE_BYTES
    assert cache.resident_bytes == 0
    assert contents(cache, pages) == [[1]] * 5
    lonely = cache_over(None, None)
    list(add_one(lonely, pages))
    assert lonely.evict() == 0
    assert contents(lonely, pages) == [[1]] * 5


def test_a_tier_that_fails_loses_no_page() -> None:
    below, pages = Notebook(), range(6)
    cache = cache_over(below, 3)
    list(add_one(cache, pages))
    below.full = True
    with pytest.raises(PagingError, match="full"):
        list(add_one(cache, pages))
    below.full = False
    values = contents(cache, pages)
    assert all(value in ([1], [2]) for value in values), values  # as far as the sweep came, and nothing else
    assert [2] in values


def test_running_out_of_memory_lowers_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, pages = cache_over(Notebook(), None), range(8)
    make, frames = torch.zeros, []

    def at_most_three(size: int, **options: object) -> Tensor:
        if len(frames) == 3:
            raise torch.OutOfMemoryError("no more")
        frames.append(make(size, **options))
        return frames[-1]

    monkeypatch.setattr(torch, "zeros", at_most_three)  # what frames are made with, and nothing else here
    for _ in range(2):
        assert sorted(add_one(cache, pages)) == list(pages)
    assert cache.capacity == 3
    assert contents(cache, pages) == [[2]] * 8


def test_a_caller_that_stops_in_the_middle_leaves_the_cache_usable() -> None:
    cache, pages = cache_over(Notebook(), 3), range(8)
    list(add_one(cache, pages))
    sweep = add_one(cache, pages)
    assert [next(sweep), next(sweep)] == [7, 6]
    sweep.close()
    assert sorted(value for [value] in contents(cache, pages)) == [1] * 6 + [2] * 2


def test_budgets_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"holds 1 page.*at least 2"):
        cache_over(Notebook(), 1)
    with pytest.raises(ConfigError, match="path="):
        cache_over(None, 4)
