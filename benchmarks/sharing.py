"""Every way in which 2 and 4 processes share windows, tokens and weights, against one process: how far it is off.

    python benchmarks/sharing.py            2 and 4 processes through gloo, five steps of each way, on a CPU
    python benchmarks/sharing.py --render   the table from the JSON

Replicas (DDP), shards (FSDP2), shared windows with shifted and with exact attention, and shards of shared windows;
Llama, Qwen3 and Gemma-3 with two layers, 4-bit, adapters, norms and embeddings that train; two packed documents of 37
and 10 tokens, so that no border lies where a document, a tile or a group ends. The cases are those of
``tests/parallel/test_combinations.py``, on two processes too. Off by, relative: losses; gradients of the fifth step, of
the norm of their own tensor and of that of the whole gradient. Beside them one process against itself with tiles of 20
tokens for 12: what another order of addition does where nothing is shared. Aim: 1e-12 in float64, 1e-6 in float32,
which Llama's gradients keep; those of Qwen3 and Gemma-3 do not, nor do they on one process with other tiles.

Correctness only: it may run beside other work. Results: benchmarks/results/sharing.json, .md.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import commit, machine

RESULTS = Path(__file__).resolve().parent / "results"
NAME = "sharing"
PROCESSES = (2, 4)


def layouts(processes: int) -> dict[str, tuple[Any, tuple[int | None, ...]]]:
    """The ways of so many processes, each with the group sizes that say something about it."""
    from longfit.parallel.device_layout import DeviceLayout

    shifted, exact = 16, None
    return {
        "replicas": (DeviceLayout(processes, 1, 1), (shifted, exact)),
        "shards": (DeviceLayout(processes, 1, processes), (shifted, exact)),
        "shared window": (DeviceLayout(processes, processes, 1), (shifted, exact)),
        "shards of a shared window": (DeviceLayout(processes, processes, processes), (shifted, exact)),
        **(
            {
                "two shared windows": (DeviceLayout(4, 2, 1), (shifted, exact)),
                "shards of two shared windows": (DeviceLayout(4, 2, 4), (shifted, exact)),
                "two shards of two shared windows": (DeviceLayout(4, 2, 2), (shifted, exact)),
            }
            if processes == 4
            else {}
        ),
    }


def measure() -> list[dict[str, Any]]:
    """Run every way, and return its row."""
    import torch
    from tests.parallel.forked import run_in_processes
    from tests.parallel.test_combinations import Case, alone_of, another_tile, errors, learn_alone

    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float64, torch.float32):
        for family in ("llama", "qwen3", "gemma3"):
            told = {"dtype": str(dtype).removeprefix("torch."), "family": family}
            both = [Case(layouts(2)["replicas"][0], family, group, dtype) for group in (16, None)]
            expected = learn_alone(both)
            for case in both:
                off = another_tile(case, expected[alone_of(case)])
                kind = "exact" if case.group_size is None else "shifted"
                rows.append({**told, "processes": 1, "way": "tiles of 20", "attention": kind, **off._asdict()})
            for processes in PROCESSES:
                named = [
                    (way, Case(layout, family, group, dtype))
                    for way, (layout, groups) in layouts(processes).items()
                    for group in groups
                ]
                cases = [case for _, case in named]
                found = run_in_processes(errors, processes, cases, expected)
                for number, (way, case) in enumerate(named):
                    off = {
                        key: max(getattr(rank[number], key) for rank in found) for key in ("loss", "tensor", "whole")
                    }
                    kind = "exact" if case.group_size is None else "shifted"
                    rows.append({**told, "processes": processes, "way": way, "attention": kind, **off})
    return rows


def table(results: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# What processes learn together, against one", "",
        f"`python benchmarks/sharing.py`, {results['machine']['cpu']}, commit {results['commit']}; five steps, four"
        " windows of two packed documents (37 and 10 tokens), 4-bit base, adapters, norms and embeddings train. The row"
        " of one process is itself with tiles of 20 tokens for 12: another order of addition, nothing shared. Largest"
        " relative difference over Llama, Qwen3 and Gemma-3.", "",
        "| dtype | processes | way | attention | losses | gradients, of their tensor | gradients, of the whole |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    worst: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in results["rows"]:
        at = worst.setdefault(tuple(row[key] for key in ("dtype", "processes", "way", "attention")), {})
        for key in ("loss", "tensor", "whole"):
            at[key] = max(at.get(key, 0.0), row[key])
    lines += [
        f"| {' | '.join(map(str, at))} | {off['loss']:.1e} | {off['tensor']:.1e} | {off['whole']:.1e} |"
        for at, off in worst.items()
    ]
    lines += ["", "float32, gradients of the whole, by family:", "", "| family | one process, tiles of 20 | several |"]
    lines.append("|---|---|---|")
    for family in dict.fromkeys(row["family"] for row in results["rows"]):
        of_family = [row for row in results["rows"] if row["dtype"] == "float32" and row["family"] == family]
        alone, several = (
            max(row["whole"] for row in of_family if (row["processes"] == 1) == one) for one in (True, False)
        )
        lines.append(f"| {family} | {alone:.1e} | {several:.1e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    path = RESULTS / f"{NAME}.json"
    if parser.parse_args().render:
        results: dict[str, Any] = json.loads(path.read_text())
    else:
        results = {"machine": machine(), "commit": commit(), "rows": measure()}
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{NAME}.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
