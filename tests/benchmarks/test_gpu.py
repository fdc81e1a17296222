"""The GPU benchmark without a GPU: it refuses, its code runs on small sizes, its table and its lines are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.gpu_report import Line, Report, table

ROOT = Path(__file__).parents[2]


def gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_without_a_card_it_says_so() -> None:
    run = gpu()
    assert run.returncode == 2
    assert "no CUDA device; try --tiny --device cpu" in run.stderr


def test_all_of_it_runs_on_small_sizes(tmp_path: Path) -> None:
    run = gpu("--tiny", "--device", "cpu", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["section"] for row in rows} == {
        "gate", "ceiling", "kernels", "layer", "attention", "train", "memory", "cards",
    }  # fmt: skip
    assert rows[0]["section"] == "gate"
    assert all(row["value"] is None or row["value"] > 0 for row in rows)
    assert all(row["note"].startswith("not measured: ") for row in rows if row["value"] is None)
    names = "\n".join(row["name"] for row in rows)
    for measured in (
        "copy on the device", "dense matmul", "share of the copy's bandwidth", "de-quantise against bitsandbytes",
        "time over dense with LoRA", "against PEFT and bitsandbytes", "exact, 128 tokens, tokens",
        "shifted, 128 tokens, times faster than exact", "plain checkpointing, 64 tokens", "time with liger-kernel",
        "offloaded layer inputs, 128 tokens", "two layers, shifted, 256 tokens", "longest context by size of card",
    ):  # fmt: skip
        assert measured in names
    markdown = (tmp_path / "gpu.md").read_text()
    assert markdown.count("\n| ") == len(rows) + 1


CARDS = r"""
import json, types
import torch
from gpu import GIB, card_rows
from gpu_bench import REAL, Bench
from gpu_report import Line, Report

torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(total_memory=80 * GIB)
report = Report({}, limit_s=0)
bench = Bench(torch.device("cpu"), REAL, report)
bench.cuda = True
card_rows(bench, 1e-14, {8192: 7 * GIB}, {"exact": Line(2 * GIB, 32_000.0)})
print(json.dumps([[row.name, row.value, row.met, row.note] for row in report.rows]))
"""


def test_cards_are_predicted_from_what_was_measured() -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'benchmarks'}"}
    run = subprocess.run([sys.executable, "-c", CARDS], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = {name: rest for name, *rest in json.loads(run.stdout.splitlines()[-1])}
    context = int((0.97 * 24 * 2**30 - 750 * 2**20 - (7 * 2**30 - 32_000 * 8192)) / 32_000) // 1024 * 1024
    assert rows["24 GiB, exact, longest context"][0] == context
    assert rows["24 GiB, exact, times the peer's 78,475"][:2] == [context / 78_475, context >= 4 * 78_475]
    assert "the card is smaller" in rows["141 GiB, exact, tried"][2]
    assert "s are left" in rows["80 GiB, exact, tried"][2]


def test_targets_and_what_there_is_no_time_for(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report({"device": "none"}, limit_s=10)
    report.add("memory", "slope", 28.7, "kB", most=32)
    report.add("train", "faster", 1.5, "x", least=2)
    assert not report.allows("train", "a long step", 3600)
    assert report.allows("train", "a short step", 0.1)
    assert [row.met for row in report.rows] == [True, False, None]
    text = table(report.machine, report.rows)
    assert "| memory | slope | 28.7 | kB | at most 32: met |" in text
    assert "at least 2: **not met**" in text
    assert "| train | a long step | - |" in text
    assert "would take about 3600 s" in capsys.readouterr().out


def test_a_line_through_two_measurements() -> None:
    line = Line.through((1000, 10_000_000), (3000, 16_000_000))
    assert (line.fixed_bytes, line.bytes_per_token) == (7_000_000, 3000)
    assert line.longest(7_000_000 + 3000 * 5000) == 4096  # whole thousands of 1,024
    assert line.longest(6_000_000) == 0
    assert Line(0, 0.0).longest(1) == 0
