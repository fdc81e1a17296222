"""metrics.jsonl survives a kill in the middle of a line, and a resumed run does not repeat lines."""

import subprocess
import sys
from pathlib import Path

import torch

from longfit.training.metrics import MetricsFile, peak_memory_bytes, read_metrics


def test_a_torn_last_line_is_skipped_and_later_lines_are_dropped_on_resume(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append({"step": step, "loss": 0.1 + step})
    file.append({"step": 3, "eval_loss": 1.0})
    with file.path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(file.path)] == [1, 2, 3, 3]
    file.keep_until(2)
    file.append({"step": 3, "loss": 9.0})
    assert read_metrics(file.path) == [{"step": 1, "loss": 1.1}, {"step": 2, "loss": 2.1}, {"step": 3, "loss": 9.0}]


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
