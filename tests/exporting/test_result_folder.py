"""A result is there whole or not at all: killed at any moment, on a full disk, beside what is there already."""

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.exporting.adapted import save_adapted

from longfit.errors import ExportError
from longfit.exporting.export import export

FORMATS: dict[str, dict[str, Any]] = {
    "gguf": {"format": "gguf", "type": "Q8_0", "ollama": True, "onto": "16bit"},
    "gguf-lora": {"format": "gguf-lora"},
    "safetensors": {"format": "safetensors", "onto": "16bit"},
    "bnb-4bit": {"format": "bnb-4bit", "onto": "16bit"},
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter and its base."""
    folder = tmp_path_factory.mktemp("adapted")
    save_adapted(folder, "llama")
    return folder / "adapter"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("format", FORMATS)
def test_what_exists_is_never_written_into(format: str, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("mine", "file"):
        with pytest.raises(ExportError, match=f"{name}: already exists and is not overwritten"):
            export(adapter, tmp_path / name, measure=False, **FORMATS[format])
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "file"}
    assert (files(tmp_path / "mine"), (tmp_path / "file").read_text()) == ({"notes.txt": b"mine"}, "mine")
    (tmp_path / "empty").mkdir()  # holds nothing that could be lost
    assert export(adapter, tmp_path / "empty", measure=False, **FORMATS[format]).files[0] in files(tmp_path / "empty")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("limit", [5_000, 20_000])
def test_a_disk_that_fills_is_named_and_leaves_nothing(format: str, limit: int, adapter: Path, tmp_path: Path) -> None:
    """No file may grow beyond the limit: a write fails in the middle, as on a full disk, whoever makes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ExportError, match=r"out: cannot be written: the disk is full .*; nothing was left there"):
            export(adapter, tmp_path / "out", measure=False, **FORMATS[format])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_killed_at_any_moment_the_next_call_has_it_whole(adapter: Path, tmp_path: Path) -> None:
    export(adapter, tmp_path / "whole", measure=False, **FORMATS["gguf"])
    began = time.monotonic()
    export(adapter, tmp_path / "again", measure=False, **FORMATS["gguf"])  # what it takes when all is imported
    seconds, whole = time.monotonic() - began, files(tmp_path / "whole")
    out, unfinished = tmp_path / "out", 0
    for part in range(7):
        process = multiprocessing.get_context("fork").Process(target=_export, args=(adapter, out))
        process.start()
        while part == 0 and process.is_alive() and not (tmp_path / ".out.unfinished").exists():
            time.sleep(0.001)  # the first kill meets it at work, however long the start takes
        time.sleep(seconds * part / 7)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if out.exists():
            assert files(out) == whole
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        unfinished += (tmp_path / ".out.unfinished").exists()
    assert unfinished, "no kill met it at work"
    export(adapter, out, measure=False, **FORMATS["gguf"])
    assert files(out) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "again", "out"}


def _export(adapter: Path, out: Path) -> None:
    export(adapter, out, measure=False, **FORMATS["gguf"])
