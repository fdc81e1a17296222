"""What each process holds of SmolLM2-135M in shards (FSDP2), and its peak against the plan: a real run, on a CPU.

    python benchmarks/shards.py            2 and 4 processes, two steps each
    python benchmarks/shards.py --render   the table from the JSON

Each cell is ``longfit train MODEL TEXT --devices N --shard N``; the numbers are those that the run itself writes: every
process's weights and peak of resident memory (``metrics.jsonl``), and the planned peak. Memory only: cells may run
beside other work. Aim: the share within 2 % of 1/N, the peak within 5 % or 50 MB.

Results: benchmarks/results/shards.json, .md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from engine_cpu import ROOT, gguf_file
from machine import commit, machine

RESULTS = Path(__file__).resolve().parent / "results"
NAME = "shards"
PROCESSES = (2, 4)
CONTEXT = 1024


def measure(processes: int) -> dict[str, Any]:
    """Run two steps, and read what the run wrote about the second."""
    with tempfile.TemporaryDirectory() as folder:
        text, run = Path(folder) / "text.txt", Path(folder) / "run"
        text.write_text((ROOT / "docs" / "explanation" / "engine.md").read_text() * 4, encoding="utf-8")
        size = str(processes)
        sharing = ("--devices", size, "--shard", size)
        command = ("train", str(gguf_file()), str(text), *sharing, "--context", str(CONTEXT), "--run-dir", str(run))
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(
            [sys.executable, "-m", "longfit", *command, "model.dtype=bfloat16", "train.steps=2"],
            env=environment, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        step = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    kept = ("weight_bytes_by_process", "peak_memory_bytes_by_process", "planned_peak_bytes")
    return {**{name: step[name] for name in kept}, "commit": commit()}


def table(results: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Shards of SmolLM2-135M on a CPU", "",
        f"`python benchmarks/shards.py`, {results['machine']['cpu']}, bf16, {CONTEXT:,} tokens, rank 16.", "",
        "| processes | weights of each, MB | largest share x N | peak of each, MB | planned, MB | largest difference |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for size, cell in results["cells"].items():
        weights, peaks = cell["weight_bytes_by_process"], cell["peak_memory_bytes_by_process"]
        planned = cell["planned_peak_bytes"]
        share = max(weights) / sum(weights) * int(size)
        off = max((peak - planned for peak in peaks), key=abs)
        shown = [", ".join(f"{size / 1e6:,.1f}" for size in sizes) for sizes in (weights, peaks)]
        lines.append(
            f"| {size} | {shown[0]} | {share:.3f} | {shown[1]} | {planned / 1e6:,.1f} |"
            f" {off / 1e6:+,.1f} MB ({off / planned:+.1%}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    path = RESULTS / f"{NAME}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    if not parser.parse_args().render:
        results["machine"] = machine()
        for processes in PROCESSES:
            results["cells"][str(processes)] = measure(processes)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{NAME}.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
