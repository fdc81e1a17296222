"""The table of what evaluation takes, and the measuring of a process."""

import importlib
import sys

import pytest

bench = importlib.import_module("benchmarks.evaluation_cpu")


def cell(peak_bytes: float, wall_s: float) -> dict[str, float]:
    return {"peak_bytes": peak_bytes, "wall_s": wall_s, "cpu_s": 2 * wall_s}


def test_aims_are_judged_where_there_is_one() -> None:
    run = {**cell(1.2e9, 301), "context": 14_336}
    cells = {"65536": cell(2.9e9, 500), "8192": cell(4e9, 20), "run": run}
    text = bench.table({"machine": "here", "torch": "2", "cells": cells})
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")][2:]
    assert [row[1].strip() for row in rows] == [
        "perplexity of one window of 8,192 tokens, exact attention",
        "perplexity of one window of 65,536 tokens, exact attention",
        "`longfit eval` on a run at 14,336 tokens, report included",
    ]
    assert [row[-2].strip() for row in rows] == ["", "yes", "**no**"]
    assert [word.strip() for word in rows[1][2:6]] == ["2,900", "500", "1,000", "3,000 MB"]


def test_a_process_is_measured_alone() -> None:
    script = "data = bytearray(80_000_000); data[::4096] = b'x' * len(data[::4096]); print('done')"
    found = bench.measured([sys.executable, "-c", script])
    assert found["output"] == "done\n"
    assert found["peak_bytes"] > 80e6
    assert found["cpu_s"] > 0
    with pytest.raises(SystemExit, match="ended with 3"):
        bench.measured([sys.executable, "-c", "raise SystemExit(3)"])
