"""The page file: contents, commits, and every kind of damage named. Killed processes are in ``test_crashes.py``."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longfit.errors import PagingError
from longfit.optim.page_file import PageFile

PAGE_BYTES = 8192


def filled(value: int) -> Tensor:
    return torch.full((PAGE_BYTES,), value, dtype=torch.uint8)


def opened(path: Path, run: str | None = "mine", pages: int = 3) -> PageFile:
    file = PageFile(path, run=run, page_bytes=PAGE_BYTES)
    file.grow(pages)
    return file


def value(file: PageFile, page: int) -> int | None:
    """What every byte of a page is; None if it was never written."""
    frame = torch.zeros(PAGE_BYTES, dtype=torch.uint8)
    if not file.read(page, frame):
        return None
    [only] = frame.unique().tolist()
    return only


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pages"


def test_pages_come_back(path: Path) -> None:
    file = opened(path)
    file.write(1, filled(5))
    file.grow(5)
    file.write(4, filled(6))
    file.write(1, filled(7))
    assert [value(file, page) for page in range(5)] == [None, 7, None, None, 6]


def test_a_commit_outlives_what_is_written_after_it(path: Path) -> None:
    file = opened(path)
    for round_ in range(1, 4):
        file.write(0, filled(10 * round_))
        file.write(1, filled(10 * round_ + 1))
        file.commit({"round": round_})
    for late in range(3):
        file.write(0, filled(90 + late))
    file.write(2, filled(99))
    assert [value(file, page) for page in range(3)] == [92, 31, 99]
    os.close(file._file)  # as a kill does: nothing of this process's memory reaches the disk

    file = opened(path)
    assert file.record == {"round": 3}
    assert [value(file, page) for page in range(3)] == [30, 31, None]
    file.write(1, filled(55))
    file.commit({"round": 4})
    file.close()
    file = opened(path)
    assert [value(file, page) for page in range(3)] == [30, 55, None]


def test_space_is_reserved_before_it_is_needed(path: Path) -> None:
    file = opened(path, pages=4)
    assert path.stat().st_blocks * 512 >= 4 * PAGE_BYTES
    for page in range(4):
        file.write(page, filled(1))
    file.commit({})
    assert path.stat().st_blocks * 512 >= 8 * PAGE_BYTES, "the next writes go to the second slots"


def test_a_file_without_a_commit_is_removed_and_one_with_it_stays(path: Path) -> None:
    file = opened(path)
    file.write(0, filled(1))
    file.close()
    file.close()
    assert not path.exists()
    file = opened(path)
    file.commit({})
    file.close()
    assert path.exists()


def test_a_run_that_died_before_its_first_commit_starts_empty(path: Path) -> None:
    file = opened(path)
    file.write(0, filled(1))
    os.close(file._file)
    file = opened(path)
    assert file.record is None
    assert value(file, 0) is None


def test_a_file_of_another_run_is_refused_and_left_alone(path: Path) -> None:
    file = opened(path, run="theirs")
    file.commit({})
    file.close()
    before = path.read_bytes()
    for run in ("mine", None):
        with pytest.raises(PagingError, match=r"run 'theirs'.*remove the file, or give another path"):
            opened(path, run=run)
    assert path.read_bytes() == before
    path.write_text("a thesis")
    with pytest.raises(PagingError, match="does not hold optimiser state"):
        opened(path)
    assert path.read_text() == "a thesis"


def test_a_file_in_use_is_refused(path: Path) -> None:
    file = opened(path)
    with pytest.raises(PagingError, match="one optimiser per file"):
        opened(path)
    file.close()
    opened(path)


def test_other_page_sizes_are_refused(path: Path) -> None:
    file = opened(path)
    file.commit({})
    file.close()
    with pytest.raises(PagingError, match=r"written with page_bytes=8192"):
        PageFile(path, run="mine", page_bytes=2 * PAGE_BYTES)


def test_damage_to_a_committed_page_is_named(path: Path) -> None:
    file = opened(path)
    file.write(0, filled(1))
    file.write(1, filled(2))
    file.commit({})
    file.close()
    with open(path, "r+b") as raw:
        raw.seek(3 * PAGE_BYTES + 100)  # page 1, slot 0
        raw.write(b"x")
    with pytest.raises(PagingError, match="page 1 of 3 is damaged"):
        opened(path)


def test_a_damaged_or_foreign_commit_is_named(path: Path) -> None:
    file = opened(path)
    file.commit({"steps": [1, 2]})
    file.close()
    record = path.with_name("pages.commit")
    whole = record.read_text()
    for damaged in (whole[: len(whole) // 2], whole.replace("[1, 2]", "[1, 3]"), "[]"):
        record.write_text(damaged)
        with pytest.raises(PagingError, match="commit record is damaged"):
            opened(path)
    other = PageFile(path.with_name("other"), run="theirs", page_bytes=PAGE_BYTES)
    other.commit({})
    record.write_text(path.with_name("other.commit").read_text())
    with pytest.raises(PagingError, match="belongs to run 'theirs'"):
        opened(path)


def test_a_cut_file_is_named(path: Path) -> None:
    file = opened(path)
    file.write(2, filled(3))
    file.commit({})
    os.truncate(path, 5 * PAGE_BYTES + 10)
    with pytest.raises(PagingError, match="cut to"):
        file.check()
    with pytest.raises(PagingError, match="page 2 ends after 10 of 8192 bytes"):
        value(file, 2)
    file.close()
    with pytest.raises(PagingError, match="page 2"):
        opened(path)


def test_a_vanished_file_is_named_and_another_one_in_its_place_too(path: Path) -> None:
    file = opened(path)
    file.write(0, filled(4))
    path.unlink()
    with pytest.raises(PagingError, match="nothing is there"):
        file.check()
    with pytest.raises(PagingError, match="vanished"):
        file.commit({})
    path.write_text("mine now")
    with pytest.raises(PagingError, match="another file is there"):
        file.check()
    assert value(file, 0) == 4, "what was written can still be saved"
    file.close()
    assert path.read_text() == "mine now"


@pytest.mark.parametrize(
    ("place", "why"), [("missing/pages", "folder does not exist"), ("", "is a folder"), ("file/pages", "folder")]
)
def test_places_where_no_file_can_be(tmp_path: Path, place: str, why: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PagingError, match=why):
        PageFile(tmp_path / place, run="mine", page_bytes=PAGE_BYTES)


def test_the_commit_is_readable_json(path: Path) -> None:
    file = opened(path)
    file.write(1, filled(1))
    file.commit({"steps": [3]})
    commit = json.loads(path.with_name("pages.commit").read_text())["commit"]
    assert (commit["run"], commit["slots"], commit["record"]) == ("mine", [None, 0, None], {"steps": [3]})
