"""metrics.jsonl survives a kill in the middle of a line, and a resumed run does not repeat lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longfit.errors import RunError
from longfit.training.metrics import MetricsFile, peak_memory_bytes, read_metrics


def test_a_torn_last_line_is_skipped_and_later_lines_are_dropped_on_resume(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    saved = tmp_path / "saved.jsonl"
    for step in (1, 2, 3):
        file.append({"step": step, "loss": 0.1 + step})
        if step == 2:
            saved.write_bytes(file.path.read_bytes())
    file.append({"step": 3, "eval_loss": 1.0})
    with file.path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(file.path)] == [1, 2, 3, 3]
    assert file.restore(saved)
    file.append({"step": 3, "loss": 9.0})
    assert read_metrics(file.path) == [{"step": 1, "loss": 1.1}, {"step": 2, "loss": 2.1}, {"step": 3, "loss": 9.0}]


def test_metrics_that_were_removed_or_changed_come_back_and_that_is_told(tmp_path: Path) -> None:
    file, saved = MetricsFile(tmp_path / "metrics.jsonl"), tmp_path / "saved.jsonl"
    file.append({"step": 1, "loss": 1.0})
    saved.write_bytes(file.path.read_bytes())
    file.path.unlink()
    assert not file.restore(saved)
    file.path.write_text('{"step": 1, "loss": 0.5}\n')
    assert not file.restore(saved)
    assert read_metrics(file.path) == [{"step": 1, "loss": 1.0}]
    assert file.restore(None)  # from the beginning
    assert read_metrics(file.path) == []


@pytest.mark.parametrize("damage", ["no json", "3", '{"loss": 1.0}', '{"step": "a"}', "[" * 100_000])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + damage + "\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_line_that_does_not_fit_leaves_the_others_whole(tmp_path: Path) -> None:
    """The disk is full in the middle of a line."""
    code = f"""
import resource, signal
from pathlib import Path
from longfit.training.metrics import MetricsFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
file = MetricsFile(Path({str(tmp_path / "metrics.jsonl")!r}))
file.append({{"step": 1}})
try:
    file.append({{"step": 2, "text": "x" * 200}})
except Exception as error:
    print(type(error).__name__, error)
file.append({{"step": 3}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_source_path())
    assert "RunError" in done.stdout
    assert "the disk is full" in done.stdout
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


def test_no_file_is_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_peak_memory_rises_with_what_is_touched_and_is_not_the_parents() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    torch.ones(64 << 20, dtype=torch.uint8)  # resident, because it is written
    held = torch.ones(before + (64 << 20), dtype=torch.uint8)
    assert peak_memory_bytes(torch.device("cpu")) >= held.nbytes
    code = "import torch; from longfit.training.metrics import peak_memory_bytes as p; print(p(torch.device('cpu')))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_source_path()
    )
    assert int(result.stdout) < held.nbytes  # a child's peak is its own, although it was forked from this process


def _source_path() -> dict[str, str]:
    import os

    import longfit

    return {**os.environ, "PYTHONPATH": str(Path(longfit.__file__).parent.parent)}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_device_or_a_pipe_in_the_place_of_metrics_is_never_read(tmp_path: Path) -> None:
    saved = tmp_path / "saved.jsonl"
    saved.write_text('{"step": 1, "loss": 2.0}\n')
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
        path = tmp_path / "metrics.jsonl"
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(RunError, match=r"metrics\.jsonl: is a (device|named pipe)"):
            read_metrics(path)
        with pytest.raises(RunError, match=r"metrics\.jsonl: is a (device|named pipe)"):
            MetricsFile(path).append({"step": 1})
        assert not MetricsFile(path).restore(saved)
        assert path.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("target", ["nowhere", "metrics.jsonl"])
def test_a_link_that_leads_nowhere_is_no_empty_file(tmp_path, target):
    (tmp_path / "metrics.jsonl").symlink_to(target)
    with pytest.raises(RunError, match=r"metrics.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")
