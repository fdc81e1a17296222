"""Experiment 2: reading beyond the native context (LongLoRA, sections 3.1 to 3.3; YaRN, section 4).

SmolLM2-135M, made for 8,192 tokens, its linear layers in NF4 with double quantisation, is extended to 16,384 and 32,768
tokens. Perplexity by position of held-out documents, always with exact attention over the whole document; the first
positions are the short-context check. Passkey retrieval on a few cells. What is compared:

    positions    none, linear interpolation, NTK, YaRN, larger theta; without any training
    training     adapters alone, with norms, or with norms and embeddings
    attention    while training: exact, shifted with groups of a quarter window, shifted with an exact last quarter

Training windows of the full context would take two cores days. Windows are shorter than the context here, and positions
are scaled for the context all the same: the model learns what scaled positions look like at short distances only.
Linear interpolation is where training has most to repair, so that is where its ingredients are told apart.

    python -m benchmarks.experiments.extension            benchmarks/results/experiments/extension.json, figures, page
    python -m benchmarks.experiments.extension --quick    three small cells: a smoke test, extension_quick.*
    python -m benchmarks.experiments.extension --only positions     or training, or passkey
"""

import argparse
import time
from dataclasses import asdict
from typing import Any

from benchmarks.experiments.cells import RESULTS, Cells, Settings, describe
from benchmarks.experiments.extension_cells import BUCKET, EMBEDDINGS, FINISHED, NORMS, all_cells, quick_cells
from benchmarks.experiments.extension_page import draw, page_values
from benchmarks.experiments.pages import write
from benchmarks.experiments.texts import held_out_documents, training_windows
from benchmarks.experiments.training import Recipe, extended_base, train, trainable
from torch import Tensor

from longfit.evaluation.passkey import passkey
from longfit.evaluation.perplexity import perplexity

LOOKED_AT, LOOK_TOKENS = ("tarfile", "argparse"), 1024  # held-out text on the way through a training
PEAK = 5e-4  # the demo's: few steps must suffice
PARTS = ("positions", "training", "passkey")


def measure(settings: Settings) -> dict[str, Any]:
    if settings["part"] == "training":
        return measure_training(settings)
    model, tokenizer = extended_base(Recipe(context=settings["context"], rope=settings["rope"]))
    if settings["part"] == "positions":
        return {"by_position": by_position(model, document(settings, tokenizer))}
    found = passkey(
        model, tokenizer, lengths=(settings["length"],), depths=settings["depths"], trials=settings["trials"]
    )
    return {
        "accuracy": found.accuracy,
        "low": found.low,
        "high": found.high,
        "cells": [asdict(cell) for cell in found.cells],
        "answers": [[trial.key, trial.answer] for trial in found.trials],
    }


def measure_training(settings: Settings) -> dict[str, Any]:
    window, steps, attention = settings["window"], settings["steps"], settings["attention"]
    recipe = Recipe(
        context=settings["context"],
        rope=settings["rope"],
        attention="exact" if attention == "exact" else "shifted",
        group_size=None if attention == "exact" else window // 4,
        exact_from=steps * 3 // 4 if attention == FINISHED else None,
        train_norms=settings["trained"] in (NORMS, EMBEDDINGS),
        train_embeddings=settings["trained"] == EMBEDDINGS,
        peak=PEAK,
        schedule="constant",
        seed=settings["seed"],
    )
    model, tokenizer = trainable(recipe)
    held_out = held_out_documents(tokenizer, LOOKED_AT, tokens=min(LOOK_TOKENS, window))
    looks: list[dict[str, Any]] = []

    def look(step: int) -> None:
        if step % max(1, steps // 2) == 0:
            losses = {
                name: perplexity(model, ids, window=len(ids), stride=len(ids)).nll for name, ids in held_out.items()
            }
            looks.append({"step": step, "nll": losses})

    look(0)
    windows = training_windows(tokenizer, window=window, number=steps, seed=settings["seed"])
    record = train(model, windows, recipe, after_step=look)
    began = time.perf_counter()
    buckets = by_position(model, document(settings, tokenizer))
    return {**record, "looks": looks, "by_position": buckets, "reading_s": time.perf_counter() - began}


def document(settings: Settings, tokenizer: Any) -> Tensor:
    name, tokens = settings["document"], settings.get("tokens", settings["context"])
    return held_out_documents(tokenizer, (name,), tokens=tokens)[name]


def by_position(model: Any, ids: Tensor) -> list[dict[str, float]]:
    """Loss in buckets of 2,048 positions of one window, exact attention."""
    found = perplexity(model, ids, window=len(ids), stride=len(ids), bucket_tokens=BUCKET)
    return [
        {"start": bucket.start, "stop": bucket.stop, "num_tokens": bucket.num_tokens, "nll": bucket.nll}
        for bucket in found.by_position
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--only", choices=PARTS, help="measure one part")
    parser.add_argument("--draw", action="store_true", help="only draw and write what was measured")
    arguments = parser.parse_args()
    found = Cells(RESULTS / f"extension{'_quick' * arguments.quick}.json")
    if not arguments.draw:
        cells = quick_cells() if arguments.quick else all_cells()
        found.run((cell for cell in cells if arguments.only in (None, cell["part"])), measure)
    if arguments.quick:
        print(*(f"{describe(record['settings'])}: {record['result']}" for record in found.records), sep="\n")
        return
    draw(found)
    write("extension.md", page_values(found))


if __name__ == "__main__":
    main()
