"""AdamW steps on a CPU: PagedAdamW resident, 8-bit and paged; torch's fused AdamW and bitsandbytes' AdamW8bit.

Correctness first: the kernels against the reference, 50 steps against torch, the paged trajectory against the resident
one. A red gate ends the run. Then every table's contestants take turns, step by step, so that a busy moment of the
machine falls on all of them; a row is the median of its turns. The peak memory of paging is that of a process of its
own. Rows that lose stay in.

    python benchmarks/optimizers.py            three minutes, benchmarks/results/optimizers.json and .md
    python benchmarks/optimizers.py --quick    the same on small sizes: a smoke test, written to optimizers_quick.*
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from longfit.kernels.dispatch import backends, use_backend
from longfit.numerics.codebooks import dynamic_map
from longfit.optim.adamw import PagedAdamW
from machine import commit, machine

RESULTS = Path(__file__).resolve().parent / "results"
BLOCK_SIZE = 256
HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@dataclass(frozen=True)
class Sizes:
    """Parameters per table, and how often each contestant has its turn (the first turn is not counted)."""

    dense: int = 100_000_000
    eight_bit: int = 20_000_000
    adapters: int = 224  # pairs of rank-16 matrices of a 4,096-wide model
    turns: int = 9


QUICK = Sizes(dense=4_000_000, eight_bit=1_000_000, adapters=20, turns=3)


# ---------------------------------------------------------------------------------------------------------------- gate
LIMITS = {
    "backends_differ": 0,
    "paged_differs_after_50_steps": 0,
    "torch_error_after_50_steps": 1e-5,  # 50 steps of a few roundings of values below 8
    "eight_bit_error_float32": 6e-5,  # these two: what bitsandbytes asks of its own CUDA optimiser, tests/test_optim.py
    "eight_bit_error_bfloat16": 1.7e-4,
    "v_median_relative_error": 0.10,
}


def gate(scratch: Path) -> dict[str, float]:
    """Return the measured errors; raise AssertionError where one is too large."""
    found = {
        "backends_differ": float(not same_bits(backend="reference")),
        "paged_differs_after_50_steps": float(not same_bits(steps=50, budget_bytes=3 * 65_536, path=scratch / "gate")),
        "torch_error_after_50_steps": error_against_torch(),
        "eight_bit_error_float32": eight_bit_error(longfit_eight_bit, torch.float32),
        "eight_bit_error_bfloat16": eight_bit_error(longfit_eight_bit, torch.bfloat16),
        "eight_bit_error_float32_bitsandbytes": eight_bit_error(bitsandbytes.optim.AdamW8bit, torch.float32),
        "eight_bit_error_bfloat16_bitsandbytes": eight_bit_error(bitsandbytes.optim.AdamW8bit, torch.bfloat16),
        "v_median_relative_error": second_moment_error(longfit_second_moment),
        "v_median_relative_error_bitsandbytes": second_moment_error(bitsandbytes_second_moment),
    }
    for name, limit in LIMITS.items():
        assert found[name] <= limit, f"red gate: {name} is {found[name]}, allowed {limit}"
    return found


def trained(steps: int, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(numel, generator=generator).to(dtype)) for numel in (300_001, 70, 65_536)]
    optimizer = make(params)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    return torch.cat([param.detach() for param in params])


def same_bits(*, backend: str | None = None, steps: int = 5, **options: Any) -> bool:
    """Whether steps with the options end where plain ones do, with either state and dtype."""
    for bits in (32, 8):
        for dtype in (torch.float32, torch.bfloat16):
            plain = trained(steps, lambda p, b=bits: PagedAdamW(p, **HYPER, state_bits=b, page_bytes=65_536), dtype)
            with use_backend(backend):
                other = trained(
                    steps, lambda p, b=bits: PagedAdamW(p, **HYPER, state_bits=b, page_bytes=65_536, **options), dtype
                )
            if not torch.equal(plain, other):
                return False
    return True


def error_against_torch() -> float:
    mine = trained(50, lambda params: PagedAdamW(params, **HYPER), torch.float32)
    theirs = trained(50, lambda params: torch.optim.AdamW(params, **HYPER), torch.float32)
    return float((mine - theirs).abs().max())


def eight_bit_error(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> float:
    """The largest mean error of a step in 50, the weights set equal after each: the procedure of bitsandbytes' test."""
    generator = torch.Generator().manual_seed(0)
    exact = nn.Parameter(torch.randn(512, 128, generator=generator) * 0.1)
    param = nn.Parameter(exact.detach().clone().to(dtype))
    mine = make([param], lr=1e-3, weight_decay=0.0)
    theirs = torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.0)
    errors = []
    for _ in range(50):
        grad = torch.randn(512, 128, generator=generator) * 0.01
        exact.grad, param.grad = grad.clone(), grad.to(dtype)
        mine.step()
        theirs.step()
        errors.append(float((param.detach().float() - exact.detach()).abs().mean()))
        with torch.no_grad():
            exact.copy_(exact.to(dtype))
            param.copy_(exact)
    return max(errors)


def longfit_eight_bit(params: list[nn.Parameter], **options: Any) -> PagedAdamW:
    return PagedAdamW(params, state_bits=8, **options)


def second_moment_error(second_moment: Callable[[nn.Parameter], Tensor]) -> float:
    """The median relative error of v after one step whose squared gradients are log-normal, sigma 4."""
    param = nn.Parameter(torch.zeros(1 << 20))
    param.grad = torch.exp(2 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)))
    exact = (1 - HYPER["betas"][1]) * param.grad.double() ** 2
    return float(((second_moment(param) - exact).abs() / exact).median())


def longfit_second_moment(param: nn.Parameter) -> Tensor:
    optimizer = PagedAdamW([param], **HYPER, state_bits=8)
    optimizer.step()
    state = optimizer.state_dict()["state"][0]
    return decoded(state["exp_avg_sq"], state["exp_avg_sq_absmax"], dynamic_map(signed=False))


def bitsandbytes_second_moment(param: nn.Parameter) -> Tensor:
    optimizer = bitsandbytes.optim.AdamW8bit([param], **HYPER)
    optimizer.step()
    state = optimizer.state[param]
    return decoded(state["state2"], state["absmax2"], state["qmap2"])


def decoded(codes: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    return levels[codes.view(-1).int()].double() * absmax.repeat_interleave(BLOCK_SIZE)


# -------------------------------------------------------------------------------------------------------------- tables
def take_turns(contestants: dict[str, Callable[[], Any]], turns: int) -> dict[str, dict[str, float]]:
    """Return median, fastest and slowest seconds of each, stepping in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, step in contestants.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return {
        name: {"median_s": statistics.median(times[1:]), "min_s": min(times[1:]), "max_s": max(times[1:])}
        for name, times in seconds.items()
    }


def with_gradients(shapes: list[int], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(numel).mul_(0.02).to(dtype)) for numel in shapes]
    for param in params:
        param.grad = torch.randn(param.numel()).mul_(1e-3).to(dtype)
    return params


def dense_table(sizes: Sizes, scratch: Path) -> dict[str, Any]:
    """One large float32 parameter: torch's fused AdamW, ours resident, ours with a tenth of the state in memory."""
    params = with_gradients([sizes.dense])
    budget = sizes.dense * 8 // 10
    paged = PagedAdamW(params, **HYPER, budget_bytes=budget, path=scratch / "dense")
    rows = take_turns(
        {
            "torch fused": torch.optim.AdamW(params, **HYPER, fused=True).step,
            "longfit 32-bit": PagedAdamW(params, **HYPER).step,
            "longfit 8-bit": PagedAdamW(params, **HYPER, state_bits=8).step,
            "longfit 32-bit, a tenth in memory": paged.step,
        },
        sizes.turns,
    )
    moved = paged.paging_statistics()
    return {
        "parameters": sizes.dense,
        "rows": rows,
        "paged": {"budget_bytes": budget, "moved_bytes_a_step": moved.moved_bytes // sizes.turns, **vars(moved)},
        "resident_over_torch": ratio(rows, "longfit 32-bit", "torch fused"),
        "paged_over_resident": ratio(rows, "longfit 32-bit, a tenth in memory", "longfit 32-bit"),
    }


def eight_bit_table(sizes: Sizes) -> dict[str, Any]:
    """8-bit moments, float32 and bfloat16 parameters; bitsandbytes has no float32 masters."""
    contestants = {}
    for dtype in (torch.float32, torch.bfloat16):
        params, name = with_gradients([sizes.eight_bit], dtype), str(dtype).removeprefix("torch.")
        contestants[f"bitsandbytes AdamW8bit, {name}"] = bitsandbytes.optim.AdamW8bit(params, **HYPER).step
        contestants[f"longfit 8-bit, {name}"] = PagedAdamW(params, **HYPER, state_bits=8).step
    last = PagedAdamW(params, **HYPER, state_bits=8, master_weights="stochastic")
    contestants["longfit 8-bit, bfloat16, stochastic"] = last.step
    rows = take_turns(contestants, sizes.turns)
    return {
        "parameters": sizes.eight_bit,
        "state_bytes_a_parameter": last.state_bytes / sizes.eight_bit,
        "rows": rows,
        "bitsandbytes_over_longfit": {
            dtype: ratio(rows, f"bitsandbytes AdamW8bit, {dtype}", f"longfit 8-bit, {dtype}")
            for dtype in ("float32", "bfloat16")
        },
    }


def adapter_table(sizes: Sizes) -> dict[str, Any]:
    """Many small parameters, as adapters are: what a call costs matters more than what an element costs."""
    params = with_gradients([16 * 4096] * (2 * sizes.adapters))
    rows = take_turns(
        {
            "torch fused": torch.optim.AdamW(params, **HYPER, fused=True).step,
            "longfit 32-bit": PagedAdamW(params, **HYPER).step,
            "longfit 8-bit": PagedAdamW(params, **HYPER, state_bits=8).step,
            "bitsandbytes AdamW8bit": bitsandbytes.optim.AdamW8bit(params, **HYPER).step,
        },
        sizes.turns,
    )
    return {"parameters": sum(param.numel() for param in params), "tensors": len(params), "rows": rows}


def ratio(rows: dict[str, dict[str, float]], one: str, other: str) -> float:
    return rows[one]["median_s"] / rows[other]["median_s"]


# -------------------------------------------------------------------------------------------------------- peak memory
def peak_of_paging(numel: int, scratch: Path) -> dict[str, int]:
    """Run three paged steps in a process of its own; return how far its memory rose above parameters and gradients."""
    command = [sys.executable, __file__, "--child", str(numel), str(scratch / "child")]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def child(numel: int, path: str) -> dict[str, int]:
    warm = with_gradients([5000])
    PagedAdamW(warm).step()  # what is imported and allocated once
    param = nn.Parameter(torch.zeros(numel))
    param.grad = torch.full((numel,), 1e-3)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = peak_bytes()
    budget = numel * 8 // 10
    optimizer = PagedAdamW([param], **HYPER, budget_bytes=budget, path=path)
    for _ in range(3):
        optimizer.step()
    return {"budget_bytes": budget, "risen_bytes": peak_bytes() - before, "limit_bytes": budget + (64 << 20)}


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(kib) * 1024


# -------------------------------------------------------------------------------------------------------------- report
def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every number that is promised, beside its target."""
    gates, dense, eight, memory = result["gate"], result["dense"], result["eight_bit"], result["memory"]
    numel, faster = f"{dense['parameters'] / 1e6:,.0f} M parameters", eight["bitsandbytes_over_longfit"]
    names = {
        "backends_differ": "backends whose bits differ from the reference's",
        "paged_differs_after_50_steps": "50 steps paged against resident, 32- and 8-bit: bits that differ",
        "torch_error_after_50_steps": "50 steps against torch's AdamW, 32-bit: largest difference",
        "eight_bit_error_float32": "8-bit against 32-bit, float32: mean error of a step (bitsandbytes' bound on CUDA)",
        "eight_bit_error_bfloat16": "the same, bfloat16",
        "v_median_relative_error": "8-bit second moment, log-normal data: median relative error",
    }
    rows = [
        (f"32-bit, {numel}, resident: time over torch's fused AdamW", dense["resident_over_torch"], 1.15, "", False),
        (f"32-bit, {numel}, a tenth resident: time over resident", dense["paged_over_resident"], 2.0, "", False),
        (
            f"the same: peak memory beside parameters and gradients (budget {memory['budget_bytes'] >> 20} and 64)",
            memory["risen_bytes"] / 2**20,
            memory["limit_bytes"] / 2**20,
            "MiB",
            False,
        ),
        ("8-bit, float32: bitsandbytes' time over longfit's", faster["float32"], 20.0, "", True),
        ("8-bit, bfloat16: bitsandbytes' time over longfit's", faster["bfloat16"], 20.0, "", True),
        ("8-bit: state without masters", eight["state_bytes_a_parameter"], 2.05, "bytes a parameter", False),
        *((names[name], gates[name], limit, "", False) for name, limit in LIMITS.items()),
    ]
    return [
        {
            "what": what,
            "reached": reached,
            "target": target,
            "unit": unit,
            "more_is_better": more,
            "met": reached >= target if more else reached <= target,
        }
        for what, reached, target, unit, more in rows
    ]


def about() -> dict[str, Any]:
    """What decides the numbers."""
    return {
        **machine("torch", "bitsandbytes"),
        "threads": torch.get_num_threads(),
        "kernels": backends()["adamw_step"].reason,
        "load_average": os.getloadavg(),
        "commit": commit(),
    }


def render(result: dict[str, Any]) -> str:
    here = result["machine"]
    lines = [
        "# AdamW steps on a CPU",
        "",
        f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads, {here['kernels']}; torch "
        f"{here['torch']}, bitsandbytes {here['bitsandbytes']}; commit {here['commit'][:10]}.",
        "Medians of steps taken in turn.",
    ]
    for title in ("dense", "eight_bit", "adapters"):
        table = result[title]
        tensors = f" in {table['tensors']} tensors" if "tensors" in table else ""
        lines += ["", f"## {table['parameters']:,} parameters{tensors}", ""]
        lines += ["| optimiser | ms a step | ns a parameter | fastest | slowest |", "|---|---|---|---|---|"]
        for name, row in table["rows"].items():
            median, fastest, slowest = (1e3 * row[key] for key in ("median_s", "min_s", "max_s"))
            each = 1e6 * median / table["parameters"]
            lines.append(f"| {name} | {median:.1f} | {each:.2f} | {fastest:.1f} | {slowest:.1f} |")
    lines += ["", "## Targets", "", "| what | reached | target | |", "|---|---|---|---|"]
    for row in result["targets"]:
        sign = "at least" if row["more_is_better"] else "at most"
        verdict = "met" if row["met"] else "**not met**"
        unit = f" {row['unit']}".rstrip()
        lines.append(f"| {row['what']} | {row['reached']:.3g}{unit} | {sign} {row['target']:.3g}{unit} | {verdict} |")
    gates, paged = result["gate"], result["dense"]["paged"]
    lines += [
        "",
        "For comparison, bitsandbytes on this CPU: 8-bit error "
        f"{gates['eight_bit_error_float32_bitsandbytes']:.2g} (float32) and "
        f"{gates['eight_bit_error_bfloat16_bitsandbytes']:.2g} (bfloat16), second moment "
        f"{100 * gates['v_median_relative_error_bitsandbytes']:.1f} %. The paged step moves "
        f"{paged['moved_bytes_a_step'] / 1e6:,.0f} MB in and out of its budget; the file is in the page cache.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: a smoke test")
    parser.add_argument("--child", nargs=2, metavar=("NUMEL", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(int(options.child[0]), options.child[1])))
        return
    sizes = QUICK if options.quick else Sizes()
    with tempfile.TemporaryDirectory(dir=RESULTS) as name:  # a disk: some systems keep /tmp in memory
        scratch = Path(name)
        result = {
            "gate": gate(scratch),
            "dense": dense_table(sizes, scratch),
            "eight_bit": eight_bit_table(sizes),
            "adapters": adapter_table(sizes),
            "memory": peak_of_paging(sizes.dense, scratch),
            "machine": about(),
        }
    result["targets"] = targets(result)
    stem = "optimizers_quick" if options.quick else "optimizers"
    (RESULTS / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{stem}.md").write_text(render(result))
    print(render(result))


if __name__ == "__main__":
    main()
