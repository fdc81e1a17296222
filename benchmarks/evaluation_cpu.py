"""What evaluation takes on a CPU: the memory and time of one long window, and of `longfit eval` on a finished run.

    window    SmolLM2-135M in NF4, positions scaled by YaRN, reads that many tokens in one window with exact attention,
              scores all but the first; the peak is resident memory of the whole process, Python and loading included
    run       `longfit eval RUN` as a user types it: perplexity by position of base, extended and tuned model,
              pass keys, short windows, the report

Every cell is a process of its own. Seconds are by the clock and of the processor (user and system, all threads): on a
machine that others use, the second divided by its cores is what a quiet one would need at the least. The text is the
language reference that every Python carries.

    python benchmarks/evaluation_cpu.py                  windows of 8,192 and 65,536 tokens; finished ones are kept
    python benchmarks/evaluation_cpu.py --run runs/x     `longfit eval runs/x`, measured anew
    python benchmarks/evaluation_cpu.py --quick          a window of 1,024 tokens
    python benchmarks/evaluation_cpu.py --render         the table from the JSON

Results: benchmarks/results/evaluation_cpu.json, .md. Aims: 65,536 tokens within 3 GB; a run within five minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAME = "evaluation_cpu"
WINDOWS, QUICK_WINDOWS = (8192, 65_536), (1024,)
MOST_BYTES, MOST_S = 3e9, 300
RUN = "run"


# ------------------------------------------------------------------------------------------------ inside a cell
def read_window(tokens: int) -> dict[str, Any]:
    """Read one window of the language reference; what was found in it, and how long reading took."""
    import pydoc_data.topics

    import torch

    import longfit
    from longfit.demo import demo_model

    model, tokenizer = longfit.load(demo_model())
    longfit.extend_context(model, tokenizer, context=max(tokens, 8192), rope="yarn")
    text = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    assert len(ids) >= tokens, f"the text has {len(ids):,} tokens"
    began, began_cpu = time.perf_counter(), time.process_time()
    found = longfit.perplexity(model, ids[:tokens], window=tokens, stride=tokens)
    return {
        "reading_s": time.perf_counter() - began,
        "reading_cpu_s": time.process_time() - began_cpu,
        "perplexity": found.perplexity,
        "last_bucket": found.by_position[-1].perplexity,
        "scored_tokens": found.num_tokens,
    }


# ------------------------------------------------------------------------------------------------ around it
def measured(command: list[str]) -> dict[str, Any]:
    """Run a command: its output, seconds by the clock, seconds of the processor, most resident memory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    began = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with {child.returncode}")
    return {
        "output": output,
        "wall_s": time.perf_counter() - began,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def measure_window(tokens: int) -> dict[str, Any]:
    found = measured([sys.executable, str(Path(__file__).resolve()), "--cell", str(tokens)])
    return json.loads(found.pop("output").splitlines()[-1]) | found


def measure_run(run: Path) -> dict[str, Any]:
    found = measured([sys.executable, "-m", "longfit", "eval", str(run)])
    report = json.loads((run / "report.json").read_text())
    del found["output"]
    return found | {key: report[key] for key in ("context", "native_context", "num_tokens")}


# ------------------------------------------------------------------------------------------------ showing
def table(results: dict[str, Any]) -> str:
    """The whole page as Markdown."""
    lines = [
        "# Evaluation on a CPU",
        "",
        f"{results['machine']}, torch {results['torch']}. Memory is resident memory of the whole process."
        " `benchmarks/evaluation_cpu.py` says how.",
        "Windows are read beside other work, so their clock counts waiting too; `longfit eval` is timed alone.",
        "",
        "| what | peak memory (MB, 10^6 bytes) | by the clock (s) | of the processor (s) | aim | reached |",
        "|---|---|---|---|---|---|",
    ]
    cells = results["cells"]
    for key in sorted((key for key in cells if key != RUN), key=int):
        cell, tokens = cells[key], int(key)
        aim = ("3,000 MB", cell["peak_bytes"] <= MOST_BYTES) if tokens == WINDOWS[-1] else None
        lines.append(row(f"perplexity of one window of {tokens:,} tokens, exact attention", cell, aim))
    if RUN in cells:
        cell = cells[RUN]
        name = f"`longfit eval` on a run at {cell['context']:,} tokens, report included"
        lines.append(row(name, cell, (f"{MOST_S} s by the clock", cell["wall_s"] <= MOST_S)))
    return "\n".join(lines) + "\n"


def row(name: str, cell: dict[str, Any], aim: tuple[str, bool] | None) -> str:
    goal, reached = ("", "") if aim is None else (aim[0], "yes" if aim[1] else "**no**")
    return (
        f"| {name} | {cell['peak_bytes'] / 1e6:,.0f} | {cell['wall_s']:,.0f} | {cell['cpu_s']:,.0f} | {goal}"
        f" | {reached} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run to evaluate")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--cell", type=int, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.cell:
        print(json.dumps(read_window(words.cell)))
        return
    import torch

    from machine import cores_of_processor

    target = RESULTS / f"{NAME}{'_quick' * words.quick}.json"
    empty: dict[str, Any] = {
        "machine": cores_of_processor(),
        "torch": torch.__version__,
        "cells": {},
    }
    results = json.loads(target.read_text()) if target.exists() else empty

    def keep(key: str, found: dict[str, Any]) -> None:
        results["cells"][key] = found
        target.write_text(json.dumps(results, indent=1) + "\n")

    if words.run:
        keep(RUN, measure_run(words.run))
    elif not words.render:
        for tokens in QUICK_WINDOWS if words.quick else WINDOWS:
            if str(tokens) not in results["cells"]:
                keep(str(tokens), measure_window(tokens))
    target.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
