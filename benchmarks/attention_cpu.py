"""Tile attention on the CPU: longfit's C++ kernel against torch's flash kernel, forward and backward.

    python benchmarks/attention_cpu.py [--repeats 7] [--only PART_OF_A_NAME] [--isa avx2]

The peer is ``aten::_scaled_dot_product_flash_attention_for_cpu`` and its backward, called as the engine's "aten"
backend calls them: a rectangle of earlier keys and a causal square, merged by log-sum-exp; grouped keys are not
repeated. First the gate: on a small tile of each kind both must agree with plain torch in float64, and longfit must err
no more than torch (in float32, than torch with twice the roundings). Then runs of both alternate, so that whatever else
the machine does meets both; medians are compared.

FLOP count visible (query, key) pairs only: 4 D a pair forward (two products), 10 D backward (five).
Both compute in the dtype that the instruction set multiplies fast, float32 or bfloat16; what torch's product of two
large matrices in that dtype reaches is measured in the same turns. Writes results/attention_cpu.json and .md, with
``--isa`` attention_cpu_<isa>.json and .md.
"""

from forced_isa import DTYPE, add_argument, suffix  # before torch

# isort: split
import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from longfit.attention.backends import tile_backward, tile_forward
from longfit.attention.tile import QueryTile
from longfit.attention.visibility import Schedule, build_schedule, document_starts
from longfit.kernels.cpu import attention as cpu_attention
from machine import commit, machine

RESULTS = Path(__file__).parent / "results"
COMPUTE = getattr(torch, DTYPE)
# Of the norm of an error, longfit's against torch's and in itself. In bfloat16 three roundings of 2^-8 (P or dS, delta,
# the result); in float32 sums of a thousand products, which tests/kernels/cpu/test_attention.py bounds one by one, and
# a probability with at most twice torch's roundings.
MOST_ERROR = {"bfloat16": (1.05, 3 * 2.0**-8), "float32": (1.05 * 2**0.5, 1024 * 2.0**-24)}


@dataclass(frozen=True)
class Case:
    """A tile of ``queries`` tokens after ``start`` earlier ones."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    start: int
    queries: int
    group_size: int | None = None
    document: int | None = None  # tokens per packed document

    def schedule(self) -> Schedule:
        total = self.start + self.queries
        position_ids = None if self.document is None else (torch.arange(total) % self.document)[None]
        starts = document_starts(1, total, position_ids=position_ids)
        return build_schedule(self.heads, starts, group_size=self.group_size)

    def smaller(self) -> "Case":
        """The same kind of tile, small enough for the gate."""
        shrink = max(1, (self.start + self.queries) // 1024)
        parts = (None if x is None else max(2, x // shrink // 2 * 2) for x in (self.group_size, self.document))
        return Case(self.name, self.heads, self.kv_heads, self.head_dim, self.start // shrink, 257, *parts)


SMOLLM2, LLAMA3 = (9, 3, 64), (32, 8, 128)
CASES = (
    Case("9/3 heads of 64, first tile", *SMOLLM2, start=0, queries=2048),
    Case("9/3 heads of 64, 8k keys", *SMOLLM2, start=7168, queries=1024),
    Case("9/3 heads of 64, 16k keys", *SMOLLM2, start=14336, queries=2048),
    Case("9/3 heads of 64, 64k keys", *SMOLLM2, start=63488, queries=2048),
    Case("9/3 heads of 64, shifted groups of 4,096", *SMOLLM2, start=14336, queries=2048, group_size=4096),
    Case("9/3 heads of 64, documents of 700 tokens", *SMOLLM2, start=14336, queries=2048, document=700),
    Case("32/8 heads of 128, first tile", *LLAMA3, start=0, queries=2048),
    Case("32/8 heads of 128, 8k keys", *LLAMA3, start=7168, queries=1024),
    Case("32/8 heads of 128, 16k keys", *LLAMA3, start=15360, queries=1024),
)


class Tile:
    """The tensors of a case, and both directions by a named backend."""

    def __init__(self, case: Case, dtype: torch.dtype = COMPUTE) -> None:
        generator = torch.Generator().manual_seed(0)

        def rows(heads: int, tokens: int) -> Tensor:
            values = torch.randn(1, tokens, heads, case.head_dim, generator=generator)
            return values.to(COMPUTE).to(dtype).transpose(1, 2)  # the same numbers in every dtype

        total = case.start + case.queries
        self.q, self.grad_out = (rows(case.heads, case.queries) for _ in range(2))
        self.k, self.v = (rows(case.kv_heads, total) for _ in range(2))
        self.schedule = case.schedule()
        self.tile = QueryTile(self.q, self.k, self.v, self.schedule, case.start, case.head_dim**-0.5)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        self.grad_k, self.grad_v = (torch.zeros(self.k.shape, dtype=sum_dtype) for _ in range(2))
        first = self.schedule.tile(case.start, case.queries)[:, 0]  # [C, t]
        visible = (torch.arange(case.start, total) - first + 1).sum(-1)  # [C]
        self.pairs = int((visible * torch.tensor(self.schedule.head_bounds).diff()).sum())

    def forward(self, backend: str) -> tuple[Tensor, Tensor]:
        return tile_forward(self.tile, backend=backend)

    def backward(self, backend: str, out: Tensor, lse: Tensor) -> Tensor:
        sums = {"grad_k": self.grad_k, "grad_v": self.grad_v}
        return tile_backward(self.tile, self.grad_out, out, lse, **sums, backend=backend)

    def gradients(self, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """out, dQ, dK, dV."""
        self.grad_k.zero_()
        self.grad_v.zero_()
        out, lse = self.forward(backend)
        return out, self.backward(backend, out, lse), self.grad_k.clone(), self.grad_v.clone()


def gate(case: Case) -> dict[str, float]:
    """The largest relative error (of out, dQ, dK, dV, in norm) of each backend; stops where longfit's is too large."""
    tile = Tile(case.smaller())
    reference = Tile(case.smaller(), torch.float64).gradients("reference")
    errors = {}
    for backend in ("cpu", "aten"):
        pairs = zip(tile.gradients(backend), reference, strict=True)
        errors[backend] = max(((x - y).norm() / y.norm()).item() for x, y in pairs)
    times_torch, most = MOST_ERROR[DTYPE]
    if not errors["cpu"] <= min(most, times_torch * errors["aten"]):
        raise SystemExit(f"gate: {case.name}: relative errors {errors}; nothing was timed")
    return errors


def alternate(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turns after one untimed turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(case: Case, repeats: int) -> dict[str, object]:
    errors, tile = gate(case), Tile(case)
    out, lse = tile.forward("cpu")
    row: dict[str, object] = {**asdict(case), "relative_error": errors}
    a, b = (torch.randn(2048, 2048).to(COMPUTE) for _ in range(2))
    for direction, flop, runs in (
        ("forward", 4, {name: lambda name=name: tile.forward(name) for name in ("cpu", "aten")}),
        ("backward", 10, {name: lambda name=name: tile.backward(name, out, lse) for name in ("cpu", "aten")}),
    ):
        seconds = alternate({**runs, "product": lambda: a @ b}, repeats)
        product = 2 * 2048**3 / seconds.pop("product") / 1e9
        gflops = {name: flop * case.head_dim * tile.pairs / s / 1e9 for name, s in seconds.items()}
        row[direction] = {
            "seconds": seconds,
            "gflops": gflops,
            "product_gflops": product,
            "of_product": gflops["cpu"] / product,
            "ratio": seconds["aten"] / seconds["cpu"],
        }
    return row


def table(report: dict[str, object]) -> str:
    about = report["machine"]
    lines = [
        "# Tile attention on the CPU",
        "",
        f"{about['cpu']}, {about['instruction set']}, {about['threads']} threads, torch {about['torch']}, commit"
        f" {about['commit']}, {about['dtype']}; medians of {report['repeats']} alternating runs; GFLOP/s over visible"
        " pairs. *of product*: of what torch's 2,048 x 2,048 product reached in the same turns. Made by"
        " `python benchmarks/attention_cpu.py`.",
        "",
        "| tile | queries | forward | of product | torch | ratio | backward | of product | torch | ratio | error |"
        " torch |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [row["name"], f"{row['queries']:,}"]
        for direction in ("forward", "backward"):
            gflops = row[direction]["gflops"]
            cells += [f"{gflops['cpu']:.0f}", f"{row[direction]['of_product']:.2f}"]
            cells += [f"{gflops['aten']:.0f}", f"{row[direction]['ratio']:.2f}"]
        cells += [f"{row['relative_error'][name]:.1e}" for name in ("cpu", "aten")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="part of a case's name; then nothing is written")
    add_argument(parser)
    args = parser.parse_args()
    reason = cpu_attention.supported()
    if reason is not None:
        sys.exit(f"longfit's kernel cannot run here: {reason}")
    rows = []
    for case in CASES:
        if args.only in case.name:
            rows.append(measure(case, args.repeats))
            print(
                case.name,
                {d: (rows[-1][d]["ratio"], rows[-1][d]["of_product"]) for d in ("forward", "backward")},
                flush=True,
            )
    report = {
        "machine": machine("torch") | {"threads": torch.get_num_threads(), "commit": commit()},
        "repeats": args.repeats,
        "rows": rows,
    }
    print(table(report))
    if not args.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"attention_cpu{suffix()}.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / f"attention_cpu{suffix()}.md").write_text(table(report))


if __name__ == "__main__":
    main()
