"""What a merge holds in memory: a generated Llama of 600 MB in several files, onto each base, beside two matrices.

Every cell is a process of its own that plans the merge, makes one small tensor (so that libraries have allocated what
they allocate once) and then writes the merged model, while a thread reads ``RssAnon`` from /proc every half a
millisecond. Pages of the mapped base are the system's to drop and do not count; the number is the most that was held
beyond the start. The aim is two of the largest matrices that the adapter changes, in float32: the base's, and its
copy with the adapter. An embedding that nothing changes is written from the mapped file.

    python benchmarks/merge_memory.py            every cell, minutes; memory only, so other work may run beside it
    python benchmarks/merge_memory.py --render   the table from the JSON

Results: benchmarks/results/merge_memory.json, .md.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAME = "merge_memory"
SHAPE = {"vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 5}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8}
SHARD_BYTES = 200_000_000
KINDS = ("16bit", "4bit")
SLACK_BYTES = 4 << 20
"""Small allocations that have no part in it: names, headers, pages of the allocator that are not given back."""


# ------------------------------------------------------------------------------------------------ what is merged
def save_adapted(folder: Path, shape: dict[str, int], *, tied: bool, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write ``base`` (bfloat16, in files of ``shard_bytes``) and ``adapter`` (rank 16 on all linear layers)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from longfit.model.save import save_adapter

    sys.path.append(str(ROOT))
    from tests.model_folders import byte_tokenizer

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # nothing of the base is made in float32 first
    model = LlamaForCausalLM(LlamaConfig(**HEADS | shape, tie_word_embeddings=tied, max_position_embeddings=512))
    torch.set_default_dtype(default)
    model.save_pretrained(folder / "base", max_shard_size=shard_bytes)
    byte_tokenizer().save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    save_adapter(adapted, byte_tokenizer(), folder / "adapter")
    return folder / "adapter"


# ------------------------------------------------------------------------------------------------ inside a cell
@dataclass(frozen=True)
class Held:
    """What one merge held.

    Attributes:
        held_bytes: most anonymous memory beyond what there was before the first weight.
        two_matrices_bytes: two of the largest matrices that the adapter changes, in float32.
        model_bytes: of the merged model.
        num_files: that it was written in.
    """

    held_bytes: int
    two_matrices_bytes: int
    model_bytes: int
    num_files: int


def merge_and_watch(adapter: Path, kind: str, out: Path, shard_bytes: int) -> Held:
    """Merge onto ``kind`` into the folder ``out``, and watch this process's memory."""
    import torch

    from longfit.exporting.merge_plan import MergePlan
    from longfit.exporting.trained import open_trained

    plan = MergePlan.of(open_trained(adapter), dtype=torch.bfloat16)
    changed = sorted((t for t in plan.tensors if t.name in plan.adapter.changed()), key=lambda t: t.num_bytes)
    plan.make(changed[0].name, plan.weights(kind))
    out.mkdir()
    most, stop = 0, threading.Event()
    before = anonymous_bytes()

    def watch() -> None:
        nonlocal most
        while not stop.is_set():
            most = max(most, anonymous_bytes())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    plan.write(out, kind, max_shard_bytes=shard_bytes)
    stop.set()
    watcher.join()
    matrix = changed[-1].num_bytes // plan.dtype.itemsize * 4
    return Held(most - before, 2 * matrix, plan.num_bytes, len(list(out.glob("*.safetensors"))))


def anonymous_bytes() -> int:
    """Resident memory of this process that is no page of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


# ------------------------------------------------------------------------------------------------ around it
def measure(adapter: Path, kind: str, out: Path, *, shard_bytes: int = SHARD_BYTES) -> Held:
    """Merge in a process of its own."""
    words = [sys.executable, str(Path(__file__).resolve()), "--cell", str(adapter), kind, str(out), str(shard_bytes)]
    # Freed memory goes back to the system at once, so that what is resident is what is held.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    environment = os.environ | allocator | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return Held(**json.loads(done.stdout.splitlines()[-1]))


def table(results: dict[str, Any]) -> str:
    """The page."""
    machine, shape = results["machine"], results["shape"]
    lines = [
        "# What a merge holds in memory",
        "",
        f"`python benchmarks/{NAME}.py`, {machine['cpu']}, torch {machine['torch']}. A generated Llama of"
        f" {shape['num_hidden_layers']} layers, hidden size {shape['hidden_size']:,},",
        f"inner size {shape['intermediate_size']:,}, {shape['vocab_size']:,} tokens, in bfloat16, read from and written"
        f" into files of {results['shard_bytes'] / 1e6:,.0f} MB; rank 16 on all linear layers.",
        "Held is anonymous memory beyond what there was before the first weight; MB are 10^6 bytes.",
        "",
        "| head | merged onto | model, MB | files | held beyond the start, MB | two largest matrices in float32, MB |",
        "|---|---|---|---|---|---|",
    ]
    for key, cell in results["cells"].items():
        head, kind = key.split(", ")
        sizes = (cell["model_bytes"], cell["held_bytes"], cell["two_matrices_bytes"])
        model, held, two = (f"{size / 1e6:,.1f}" for size in sizes)
        lines.append(f"| {head} | {kind} | {model} | {cell['num_files']} | {held} | {two} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.cell:
        adapter, kind, out, shard_bytes = words.cell
        print(json.dumps(vars(merge_and_watch(Path(adapter), kind, Path(out), int(shard_bytes)))))
        return
    path = RESULTS / f"{NAME}.json"
    if words.render:
        results = json.loads(path.read_text())
    else:
        from machine import commit, machine

        results = {"machine": machine(), "shape": SHAPE | HEADS, "shard_bytes": SHARD_BYTES, "cells": {}}
        for tied, kind in itertools.product((True, False), KINDS):
            with tempfile.TemporaryDirectory() as folder:
                adapter = save_adapted(Path(folder), SHAPE, tied=tied)
                cell = vars(measure(adapter, kind, Path(folder) / "out")) | {"commit": commit()}
            results["cells"][f"{'tied' if tied else 'untied'}, {kind}"] = cell
            print(results["cells"], flush=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
