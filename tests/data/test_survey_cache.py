"""A large path is read once to know its documents: a later start knows them, and notices every change."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from longfit.data import survey_cache
from longfit.data.documents import Documents, read_documents
from longfit.data.sources import FileSource


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(survey_cache, "SETTLED_SECONDS", 0.0)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("hello")
    (folder / "b.jsonl").write_text('{"text": "x", "id": 3}\n{"text": ""}\n{"text": "x"}\n{"text": "e\\u0301"}\n')
    (folder / "c.ipynb").write_text('{"cells": [{"source": "s"}, {"source": ""}]}')
    (folder / "d.bin").write_bytes(b"\0")
    time.sleep(0.05)  # a clock tick of the file system
    return folder


def read(folder: Path, **options: object) -> tuple[Documents, int]:
    """The documents, and how many were read to know them."""
    counts = [0]
    documents = read_documents(folder, cache=folder.parent / "cache", on_document=counts.append, **options)  # type: ignore[arg-type]
    return documents, counts[-1]


def test_a_second_start_reads_nothing_and_knows_the_same(folder: Path) -> None:
    first, first_read = read(folder)
    second, second_read = read(folder)
    assert (first_read > 0, second_read) == (True, 0)
    assert second.report == first.report
    assert first.report.unread == (("id", 1),)
    assert first.report.skipped
    assert first.report.extractions[0][1].empty == (2,)
    assert second.is_chat == first.is_chat
    for name in ("source", "position", "digests"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert (
        [document.text for document in second]
        == [document.text for document in first]
        == ["hello", "x", "x", "e\u0301", "s"]
    )


def test_other_files_times_and_settings_are_read_anew(folder: Path) -> None:
    assert read(folder)[1]
    assert read(folder, normalise="nfc")[1]
    stat = (folder / "a.txt").stat()
    (folder / "a.txt").write_text("jello")  # of the same size
    os.utime(folder / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    documents, num_read = read(folder)
    assert num_read
    assert next(iter(documents)).text == "jello"
    (folder / "a.txt").rename(folder / "e.txt")
    assert read(folder)[1]


def test_what_changed_just_now_or_is_small_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(folder, cached_bytes=10_000)[1]
    assert not (folder.parent / "cache").exists()
    monkeypatch.setattr(survey_cache, "SETTLED_SECONDS", 60.0)
    assert read(folder)[1]
    assert read(folder)[1]
    assert not (folder.parent / "cache").exists()


def test_a_damaged_entry_is_read_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(folder)
    (entry,) = (folder.parent / "cache").iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    assert read(folder)[1]
    assert not read(folder)[1]
    reads = []
    monkeypatch.setattr(FileSource, "read", lambda *given: reads.append(given) or iter(()))
    read(folder)
    assert not reads
