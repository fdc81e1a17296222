"""Reading a document and answering on a CPU: longfit's reader beside its own training forward, and beside the peer.

SmolLM2-135M, NF4 with double quantisation, rank-16 adapters as in ``longfit chat --run``; the peer is transformers +
bitsandbytes with PEFT's adapters and torch's attention, in its best dtype. Every cell is a process of its own.

    forward    the decoder's swept forward pass over the document, as in training
    read       ``Reader.read`` of the document
    longfit    tokens generated after a short prompt, one by one, from cached keys and values
    peer       the same by transformers' ``generate``

    python benchmarks/chat_cpu.py                  14,000 tokens; finished cells of the JSON are not run again
    python benchmarks/chat_cpu.py --quick          1,024 tokens, into chat_cpu_quick.json
    python benchmarks/chat_cpu.py --isa avx2       as on a processor without AVX-512, peer and longfit alike
    python benchmarks/chat_cpu.py --render         the table from the JSON

Results: benchmarks/results/chat_cpu.json, .md; with --isa chat_cpu_<isa>.
"""

from forced_isa import add_argument, suffix  # before torch

# isort: split
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from engine_cpu import RESULTS, ROOT, Cell, dense_folder, longfit_model, peer_model, save, token_ids
from machine import commit, machine

CELLS = ("forward", "read", "longfit", "peer")
DOCUMENT, QUICK_DOCUMENT, PROMPT, GENERATED, REPEATS = 14_000, 1024, 512, 48, 3
LEAST_READING, LEAST_GENERATION = 0.85, 3.0


def seconds_of(function: Callable[[], Any], repeats: int) -> float:
    """The median time of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


def measure(cell: str, folder: Path, document: int) -> dict[str, Any]:
    """Tokens per second of one cell."""
    import torch

    torch.manual_seed(0)
    if cell == "peer":
        model, tokenizer = peer_model(folder)
        model.gradient_checkpointing_disable()
        prompt = token_ids(tokenizer, PROMPT)

        def answer(count: int) -> None:
            with torch.inference_mode():
                model.eval().generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)

        return {"tokens_per_s": (GENERATED - 1) / (seconds_of(lambda: answer(GENERATED), REPEATS) - once(answer))}
    model, tokenizer = longfit_model(folder, Cell("longfit", document), folder)
    ids = token_ids(tokenizer, document)
    if cell == "forward":
        from longfit.engine.hf_model import decoder

        return {"tokens_per_s": document / seconds_of(lambda: decoder(model)(input_ids=ids, use_cache=False), REPEATS)}
    from longfit.evaluation.reader import Reader

    if cell == "read":
        return {"tokens_per_s": document / seconds_of(lambda: Reader(model).read(ids[0]), REPEATS)}
    tokens = token_ids(tokenizer, PROMPT)[0]

    def continue_text(count: int) -> None:
        reader, text = Reader(model), tokens
        for _ in range(count):
            text = torch.cat([text, reader.read(text)[0].argmax()[None]])

    seconds = seconds_of(lambda: continue_text(GENERATED), REPEATS) - once(continue_text)
    return {"tokens_per_s": (GENERATED - 1) / seconds}


def once(answer: Callable[[int], None]) -> float:
    """What it takes to read the prompt and to give the first token."""
    return seconds_of(lambda: answer(1), REPEATS)


def table(results: dict[str, Any]) -> str:
    speeds = {name: value["tokens_per_s"] for name, value in results["cells"].items() if "error" not in value}
    lines = [
        "# Reading and answering on a CPU",
        "",
        "SmolLM2-135M, NF4 with double quantisation, rank 16; medians. "
        + ", ".join(f"{name} {value}" for name, value in results["machine"].items())
        + ".",
        "",
        "| what | tokens/s | commit |",
        "|---|---|---|",
    ]
    names = {
        "forward": f"forward pass of training, {results['document']:,} tokens",
        "read": f"reading, {results['document']:,} tokens",
        "longfit": f"generation after {PROMPT} tokens, longfit",
        "peer": "the same, transformers + bitsandbytes",
    }
    for cell, value in results["cells"].items():
        lines.append(f"| {names[cell]} | {speeds.get(cell, float('nan')):.1f} | {value['commit']} |")
    lines += ["", "| target | measured | met |", "|---|---|---|"]
    for first, second, least, words in (
        ("read", "forward", LEAST_READING, "reading: at least {} of the forward pass of training"),
        ("longfit", "peer", LEAST_GENERATION, "generation: at least {} times the peer's"),
    ):
        if first in speeds and second in speeds:
            ratio = speeds[first] / speeds[second]
            lines.append(f"| {words.format(least)} | {ratio:.2f} | {'yes' if ratio >= least else '**no**'} |")
    return "\n".join(lines) + "\n"


def run(path: Path, document: int, *, fresh: bool) -> dict[str, Any]:
    """Run the cells that the JSON does not have yet."""
    results: dict[str, Any] = {"machine": machine(), "document": document, "cells": {}}
    if path.exists() and not fresh:
        results = json.loads(path.read_text())
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as parent:
        folder = dense_folder(Path(parent))
        for cell in CELLS:
            if "error" not in results["cells"].get(cell, {"error": "not run"}):
                continue
            words = [sys.executable, __file__, "--cell", cell, "--folder", str(folder), "--document", str(document)]
            done = subprocess.run(words, env=environment, capture_output=True, text=True)
            failed = {"error": done.stderr.strip().splitlines()[-1:]}
            outcome = failed if done.returncode else json.loads(done.stdout.strip().splitlines()[-1])
            results["cells"][cell] = {**outcome, "commit": commit()}
            save(results, path)
            print(cell, results["cells"][cell], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a document of 1,024 tokens, into chat_cpu_quick.json")
    parser.add_argument("--fresh", action="store_true", help="forget finished cells")
    parser.add_argument("--render", action="store_true", help="the table from the JSON")
    parser.add_argument("--cell", choices=CELLS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--document", type=int, help=argparse.SUPPRESS)
    add_argument(parser)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(arguments.cell, arguments.folder, arguments.document)))
        return
    name = f"chat_cpu{suffix()}"
    path = RESULTS / f"{name}{'_quick' if arguments.quick else ''}.json"
    document = QUICK_DOCUMENT if arguments.quick else DOCUMENT
    results = json.loads(path.read_text()) if arguments.render else run(path, document, fresh=arguments.fresh)
    if arguments.quick:
        print(table(results))
    else:
        (RESULTS / f"{name}.md").write_text(table(results))


if __name__ == "__main__":
    main()
