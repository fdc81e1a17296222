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

    python -m benchmarks.experiments.extension            benchmarks/results/experiments/extension.json and the figures
    python -m benchmarks.experiments.extension --quick    three small cells: a smoke test, extension_quick.*
    python -m benchmarks.experiments.extension --only positions     or training, or passkey
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.experiments.cells import IMAGES, RESULTS, Cells, Settings
from benchmarks.experiments.texts import held_out_documents, training_windows
from benchmarks.experiments.training import Recipe, extended_base, train, trainable
from torch import Tensor

from longfit.evaluation.passkey import passkey
from longfit.evaluation.perplexity import perplexity

NATIVE, BUCKET = 8192, 2048
ROPES = ("none", "yarn", "linear", "ntk", "theta")
COLOURS = dict(zip(ROPES, ("black", "C0", "C1", "C2", "C4"), strict=True))
LOOKED_AT, LOOK_TOKENS = ("tarfile", "argparse"), 1024  # held-out text on the way through a training
PEAK = 5e-4  # the demo's: few steps must suffice
LORA, NORMS, EMBEDDINGS = "LoRA", "LoRA + norms", "LoRA + norms + embeddings"  # what is trained
FINISHED = "shifted, then exact"  # the last quarter of the steps
PARTS = ("positions", "training", "passkey")


def positions(context: int, document: str) -> Iterator[Settings]:
    """Every scaling of the positions, without training."""
    for rope in ROPES:
        yield {"part": "positions", "rope": rope, "context": context, "document": document}


def short_context(context: int, document: str) -> Iterator[Settings]:
    """What a scaling costs where none is needed, without reading farther."""
    for rope in ROPES:
        yield {"part": "positions", "rope": rope, "context": context, "document": document, "tokens": BUCKET}


def training(*, context: int, window: int, steps: int, document: str) -> Iterator[Settings]:
    """Ingredients of a training, the most telling first."""
    size = {"context": context, "window": window, "steps": steps, "document": document}
    for rope, trained, attention, seed in (
        ("linear", LORA, "exact", 0),
        ("linear", LORA, "shifted", 0),
        ("linear", NORMS, "exact", 0),
        ("linear", EMBEDDINGS, "exact", 0),
        ("yarn", LORA, "exact", 0),
        ("linear", LORA, "exact", 1),
        ("linear", LORA, "shifted", 1),
        ("linear", LORA, FINISHED, 0),
        ("yarn", LORA, "shifted", 0),
        ("linear", NORMS, "exact", 1),
        ("linear", EMBEDDINGS, "exact", 1),
        ("linear", EMBEDDINGS, "shifted", 0),
        ("yarn", NORMS, "exact", 0),
        ("yarn", EMBEDDINGS, "exact", 0),
        ("linear", LORA, FINISHED, 1),
    ):
        yield {"part": "training", "rope": rope, "trained": trained, "attention": attention, "seed": seed, **size}


def retrieval(rope: str, context: int, length: int, depths: Sequence[float], trials: int) -> Settings:
    return {
        "part": "passkey",
        "rope": rope,
        "context": context,
        "length": length,
        "depths": list(depths),
        "trials": trials,
    }


def all_cells() -> Iterator[Settings]:
    """All of it, the most telling first: a run may be broken off at any time."""
    near, far = 2 * NATIVE, 4 * NATIVE
    trainings = list(training(context=near, window=2048, steps=8, document="tarfile"))
    depths = (0.0, 0.5, 1.0)
    yield from short_context(near, "tarfile")
    yield from short_context(far, "tarfile")
    yield from trainings[:4]
    yield from positions(near, "tarfile")
    yield from trainings[4:8]
    yield from (retrieval(rope, near, 12_288, depths, 2) for rope in ("yarn", "none"))
    yield from (retrieval(rope, near, 4096, depths, 2) for rope in ("yarn", "none", "linear"))
    yield from trainings[8:]
    yield from positions(far, "turtle")
    yield from positions(near, "turtle")
    yield retrieval("linear", near, 12_288, depths, 2)


def quick_cells() -> Iterator[Settings]:
    yield {"part": "positions", "rope": "yarn", "context": 2 * NATIVE, "document": "tarfile", "tokens": 512}
    size = {"context": 2 * NATIVE, "window": 256, "steps": 2, "document": "tarfile", "tokens": 512}
    recipe = {"rope": "linear", "trained": EMBEDDINGS, "attention": FINISHED, "seed": 0}
    yield {"part": "training", **recipe, **size}
    yield retrieval("yarn", 2 * NATIVE, 256, (0.5,), 1)


# ------------------------------------------------------------------------------------------------ measuring
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


def mean_perplexity(buckets: Sequence[dict[str, float]], start: int, stop: float) -> float:
    """Perplexity of the positions ``[start, stop)``, whose bounds are bounds of buckets."""
    inside = [bucket for bucket in buckets if start <= bucket["start"] and bucket["stop"] <= stop]
    tokens = sum(bucket["num_tokens"] for bucket in inside)
    return math.exp(sum(bucket["num_tokens"] * bucket["nll"] for bucket in inside) / tokens)


# ------------------------------------------------------------------------------------------------ showing
def describe_training(settings: Settings) -> str:
    seed = f", seed {settings['seed']}" if settings["seed"] else ""
    return f"{settings['rope']}, {settings['trained']}, {settings['attention']}{seed}"


def tables(found: Cells) -> str:
    """Markdown rows, as in docs/explanation/extension.md."""
    lines = []
    for part, name in (("positions", lambda s: f"{s['rope']}, no training"), ("training", describe_training)):
        for record in found.select(part=part):
            settings, buckets = record["settings"], record["result"]["by_position"]
            values = " | ".join(f"{math.exp(bucket['nll']):.2f}" for bucket in buckets)
            lines.append(f"| {name(settings)} | {settings['document']} | {settings['context']:,} | {values} |")
    for record in found.select(part="passkey"):
        settings, result = record["settings"], record["result"]
        won = " | ".join(
            f"depth {cell['depth']:g}: {cell['num_correct']}/{cell['num_trials']}, {cell['key_nll']:.1f} nats"
            for cell in result["cells"]
        )
        lines.append(f"| {settings['rope']} | {settings['length']:,} | {won} |")
    return "\n".join(lines)


def curve(axes: Any, buckets: Sequence[dict[str, float]], **style: Any) -> None:
    centres = [(bucket["start"] + bucket["stop"]) / 2 for bucket in buckets]
    axes.plot(centres, [math.exp(bucket["nll"]) for bucket in buckets], marker="o", markersize=4, **style)


def draw_positions(found: Cells, path: Any) -> None:
    """Perplexity by position for every scaling; one panel for each document and context."""
    from matplotlib.figure import Figure

    shown = [(2 * NATIVE, "tarfile"), (2 * NATIVE, "turtle"), (4 * NATIVE, "turtle")]
    shown = [panel for panel in shown if found.select(part="positions", context=panel[0], document=panel[1])]
    figure = Figure(figsize=(5.5 * max(1, len(shown)), 4.2), layout="constrained")
    for axes, (context, name) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for rope in ROPES:
            for record in found.select(part="positions", context=context, document=name, rope=rope):
                if "tokens" not in record["settings"]:
                    curve(axes, record["result"]["by_position"], color=COLOURS[rope], label=rope)
        axes.axvline(NATIVE, color="grey", linestyle=":", label="native context")
        axes.set(yscale="log", xlabel="position (tokens)", ylabel="perplexity", title=f"{name}, scaled for {context:,}")
        axes.legend(frameon=False)
    save(figure, path)


def draw_training(found: Cells, path: Any) -> None:
    """Perplexity by position after training, over that of the same positions untrained."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, rope in zip(figure.subplots(1, 2), ("linear", "yarn"), strict=True):
        records = found.select(part="training", rope=rope)
        untrained = found.select(part="positions", rope=rope, context=2 * NATIVE, document="tarfile")
        for record in untrained:
            curve(axes, record["result"]["by_position"], color="black", label="no training")
        for record in records:
            settings = record["settings"]
            curve(
                axes,
                record["result"]["by_position"],
                color={"exact": "C0", "shifted": "C3"}.get(settings["attention"], "C2"),
                linestyle=("--" if settings["trained"] != LORA else "-") if not settings["seed"] else ":",
                label=describe_training(settings).partition(", ")[2],
            )
        axes.axvline(NATIVE, color="grey", linestyle=":")
        axes.set(yscale="log", xlabel="position (tokens)", ylabel="perplexity", title=f"{rope}, tarfile, held out")
        axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def save(figure: Any, path: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--only", choices=PARTS, help="measure one part")
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    arguments = parser.parse_args()
    found = Cells(RESULTS / f"extension{'_quick' * arguments.quick}.json")
    if not arguments.draw:
        cells = quick_cells() if arguments.quick else all_cells()
        found.run((cell for cell in cells if arguments.only in (None, cell["part"])), measure)
    print(tables(found))
    if not arguments.quick:
        draw_positions(found, IMAGES / "extension-positions.png")
        if found.select(part="training"):
            draw_training(found, IMAGES / "extension-training.png")


if __name__ == "__main__":
    main()
