"""What trackers take of a run: none, TensorBoard, and sinks that are slow, down, hanging or full.

A tracker can slow a run in two ways, and both are measured without comparing clocks of different runs, which on a
machine that others use differ by more than one part in a hundred:

    the run waits       seconds by the clock that the training thread spends on trackers: starting them, and waiting at
                        the end; over the seconds that the whole training took, in the same run
    the run is robbed   processor seconds of the trackers' own processes. They run at niceness 19, whose weight is 15
                        beside 1,024: on idle cores they cost nothing, on a busy one never more than 15/1,039 of it

So what a run loses is at most the first and the smaller of the second and of 1.5 % of one core. The sum is the table's
last column. Processor seconds of a step in the run's own process, with and without, stand beside as a check.

    python benchmarks/trackers.py            every case, minutes; other work may run beside it
    python benchmarks/trackers.py --render   the table from the JSON

Results: benchmarks/results/trackers.json, .md. Aim: a run loses at most 1 %.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import ROOT, commit, machine

sys.path.append(str(ROOT))
RESULTS = Path(__file__).resolve().parent / "results"
NAME = "trackers"
STEPS, CONTEXT = 150, 512
MOST_SHARE = 0.01
NICE_SHARE = 15 / (1024 + 15)
"""Of a busy core: what Linux gives a process of niceness 19 beside one of niceness 0 (kernel/sched, weights)."""
SINK = """
import errno, os, time
KIND = os.environ["SINK"]
def init(project, name):
    if KIND == "down":
        raise ConnectionError("no route to host")
    while KIND == "hangs":
        time.sleep(1)
def log(numbers, step):
    if KIND == "slow":
        time.sleep(5)
    if KIND == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
def finish():
    pass
"""
CASES = {
    "none": [],
    "TensorBoard": ["tensorboard"],
    "slow: 5 s a line": ["wandb"],
    "down: fails at once": ["wandb"],
    "hangs: never answers": ["wandb"],
    "full: each line fails": ["wandb"],
}


def measure(case: str, folder: Path) -> dict[str, Any]:
    """Train with a tracker; ``folder`` has the model and the text."""
    from longfit.config import RunConfig
    from longfit.training import loop
    from longfit.training.metrics import read_metrics
    from longfit.training.trackers import Trackers

    waited, started = 0.0, []

    class Timed(Trackers):
        """Trackers whose calls are timed."""

        def __init__(self, *arguments: Any, **more: Any) -> None:
            nonlocal waited
            began = time.perf_counter()
            super().__init__(*arguments, **more)
            waited += time.perf_counter() - began
            started.append(self)

        def finish(self, **more: Any) -> list[str]:
            nonlocal waited
            began = time.perf_counter()
            problems = super().finish(**more)
            waited += time.perf_counter() - began
            return problems

    os.environ["SINK"] = case.split(":")[0]
    config = RunConfig.of(
        {
            "model.name": str(folder / "model"),
            "model.quant": "none",
            "data.path": str(folder / "book.txt"),
            "context.context": CONTEXT,
            "train.steps": STEPS,
            "train.save_every": STEPS,
            "output.track": CASES[case],
            "output.run_dir": str(folder / case.split(":")[0].lower()),
        }
    )
    loop.Trackers = Timed  # type: ignore[misc]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, began_cpu = time.perf_counter(), time.process_time()
    result = loop.train(config)
    wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    loop.Trackers = Trackers  # type: ignore[misc]
    assert result.finished
    assert len([r for r in read_metrics(result.run_dir / "metrics.jsonl") if "loss" in r]) == STEPS
    for process in started[0]._processes.values():  # one that is still busy has done what it does to the run
        process.kill()
        process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "waited_s": waited, "tracker_cpu_s": used, "run_cpu_s": cpu}


def lost_share(cell: dict[str, Any], cores: int) -> float:
    """The most that a run lost: what it waited, and what was taken of its cores."""
    robbed = min(cell["tracker_cpu_s"], NICE_SHARE * cell["wall_s"]) / cores
    return float((cell["waited_s"] + robbed) / cell["wall_s"])


def table(results: dict[str, Any]) -> str:
    """The page."""
    about, cores = results["machine"], results["machine"]["cores"]
    lines = [
        "# What trackers take of a run",
        "",
        f"`python benchmarks/{NAME}.py`, {about['cpu']}, {cores} cores, beside other work. {STEPS} steps of {CONTEXT}"
        " tokens of a tiny model, a line",
        "of metrics each: more lines a second than any real run has. A run waits for its trackers, at most, when it"
        " starts them and at its",
        "end; what their processes take of its cores is bounded by their niceness. Lost is the most that both come to.",
        "",
        "| tracker | run, s | run waited, s | processor seconds of the tracker | of the run, a step, ms | lost at most"
        " | within 1 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, cell in results["cells"].items():
        lost = lost_share(cell, cores)
        lines.append(
            f"| {case} | {cell['wall_s']:,.0f} | {cell['waited_s']:.3f} | {cell['tracker_cpu_s']:.2f}"
            f" | {1e3 * cell['run_cpu_s'] / STEPS:.1f} | {lost:.2%} | {'yes' if lost <= MOST_SHARE else '**no**'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    path = RESULTS / f"{NAME}.json"
    if parser.parse_args().render:
        results = json.loads(path.read_text())
    else:
        from tests.evaluation.finished_run import prose
        from tests.model_folders import save_model

        results = {"machine": machine(), "commit": commit(), "cells": {}}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_model(folder / "model", max_position_embeddings=CONTEXT, hidden_size=128, intermediate_size=256)
            (folder / "book.txt").write_text(prose(20_000))
            (folder / "packages").mkdir()
            (folder / "packages" / "wandb.py").write_text(SINK)
            sys.path.insert(0, str(folder / "packages"))
            os.environ["PYTHONPATH"] = os.pathsep.join([str(folder / "packages"), str(ROOT / "src")])
            for case in CASES:
                results["cells"][case] = measure(case, folder)
                print(case, results["cells"][case], flush=True)
                path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
