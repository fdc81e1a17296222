"""Experiment 3: what shifted attention costs and brings (LongLoRA, section 3.2, and its tables 2 and 6).

Brings: a step's time against exact attention, at several window lengths, groups of a quarter of the window. Costs:
held-out loss, always measured with exact attention, after equal numbers of tokens and after equal time. The trainings
are those of experiment 2, with linear interpolation, where there is most to learn. Each figure says how far shifted
attention carries information at all: (L + 1) G / 2 tokens through L layers with groups of G.

Times are processor time of all threads together, exact and shifted in turn, so that they mean something on a machine
that others use; the median of several turns. The same step on the same window has the same work, whatever its text.

    python -m benchmarks.experiments.shifted_attention            shifted_attention.json, and the figure
    python -m benchmarks.experiments.shifted_attention --quick    small windows: a smoke test
"""

import argparse
import time
from collections.abc import Iterator
from statistics import mean, median
from typing import Any

import torch
from benchmarks.experiments.cells import IMAGES, RESULTS, Cells, Settings
from benchmarks.experiments.extension import NATIVE, save
from benchmarks.experiments.texts import reference
from benchmarks.experiments.training import Recipe, trainable
from torch import Tensor

from longfit.engine.attention import attention_key
from longfit.engine.doors import base_model
from longfit.engine.loss import training_loss
from longfit.numerics.shifted_attention import receptive_field

LAYERS = 30
WINDOWS = (2048, 4096, 8192, 16_384)


def cells(windows: tuple[int, ...], turns: int) -> Iterator[Settings]:
    for window in windows:
        yield {"part": "time", "window": window, "group_size": window // 4, "turns": turns}


def measure(settings: Settings) -> dict[str, Any]:
    """Exact and shifted steps in turn on one model; the first of each is not counted where there are several."""
    window, turns = settings["window"], settings["turns"]
    model, tokenizer = trainable(Recipe(context=2 * NATIVE))
    ids = reference(tokenizer)[:window]
    times: dict[str, list[float]] = {"exact": [], "shifted": []}
    for turn in range(turns + (turns > 1)):
        for attention, seconds in times.items():
            group_size = settings["group_size"] if attention == "shifted" else None
            base_model(model).set_attn_implementation(attention_key(attention, group_size))
            measured = step_cpu_s(model, ids)
            if turn or turns == 1:
                seconds.append(measured)
    return {
        "cpu_s": times,
        "ratio": median(times["exact"]) / median(times["shifted"]),
        "reach": receptive_field(LAYERS, settings["group_size"]),
    }


def step_cpu_s(model: Any, ids: Tensor) -> float:
    """Processor time of forward and backward."""
    began = time.process_time()
    training_loss(model, ids[None]).backward()
    seconds = time.process_time() - began
    model.zero_grad(set_to_none=True)
    return seconds


def table(found: Cells) -> str:
    """Markdown rows, as in docs/explanation/shifted-attention.md."""
    lines = [
        "| window | group | reach | exact, cpu s | shifted, cpu s | exact / shifted |",
        "|---|---|---|---|---|---|",
    ]
    for record in found.select(part="time"):
        settings, result = record["settings"], record["result"]
        exact, shifted = (median(result["cpu_s"][name]) for name in ("exact", "shifted"))
        lines.append(
            f"| {settings['window']:,} | {settings['group_size']:,} | {result['reach']:,} | {exact:.1f}"
            f" | {shifted:.1f} | {result['ratio']:.2f} |"
        )
    return "\n".join(lines)


def trainings(extension: Cells) -> list[dict[str, Any]]:
    return extension.select(part="training", rope="linear", norms_and_embeddings=False)


def curves(extension: Cells) -> str:
    """Held-out loss on the way, as Markdown rows."""
    lines = []
    for record in trainings(extension):
        settings, result = record["settings"], record["result"]
        values = " | ".join(f"{mean(look['nll'].values()):.4f}" for look in result["looks"])
        seconds = sum(result["step_cpu_s"])
        lines.append(f"| {settings['attention']}, seed {settings['seed']} | {values} | {seconds:.0f} cpu s |")
    return "\n".join(lines)


def draw(found: Cells, extension: Cells, path: Any) -> None:
    """Time of a step on the left; held-out loss over tokens and over time on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rows = found.select(part="time")
    windows = [row["settings"]["window"] for row in rows]
    for attention, colour in (("exact", "C0"), ("shifted", "C3")):
        seconds = [median(row["result"]["cpu_s"][attention]) for row in rows]
        per_token = [1000 * s / window for s, window in zip(seconds, windows, strict=True)]
        left.plot(windows, per_token, marker="o", color=colour, label=attention)
    left.set(xlabel="window (tokens)", ylabel="processor time (ms a token)", title="one training step", ylim=(0, None))
    left.set_xticks(windows)
    left.legend(frameon=False)
    for record in trainings(extension):
        settings, result = record["settings"], record["result"]
        steps = [look["step"] for look in result["looks"]]
        losses = [mean(look["nll"].values()) for look in result["looks"]]
        spent = [sum(result["step_cpu_s"][:step]) for step in steps]
        style = {
            "color": {"exact": "C0", "shifted": "C3"}.get(settings["attention"], "C2"),
            "linestyle": "--" if settings["seed"] else "-",
            "marker": "o",
            "markersize": 4,
        }
        name = settings["attention"] + (f", seed {settings['seed']}" if settings["seed"] else "")
        middle.plot([step * settings["window"] for step in steps], losses, label=name, **style)
        right.plot(spent, losses, **style)
        reach = receptive_field(LAYERS, settings["window"] // 4)
        title = f"windows of {settings['window']:,}: reach {reach:,} tokens"
        middle.set(xlabel="tokens trained on", ylabel="held-out loss, exact attention", title=title)
    right.set(xlabel="processor time (s)", title="the same over time")
    middle.legend(frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = Cells(RESULTS / f"shifted_attention{'_quick' * arguments.quick}.json")
    if not arguments.draw:
        found.run(cells((256, 512), 1) if arguments.quick else cells(WINDOWS, 2), measure)
    extension = Cells(RESULTS / "extension.json")
    print(table(found))
    print(curves(extension))
    if not arguments.quick:
        draw(found, extension, IMAGES / "shifted-attention.png")


if __name__ == "__main__":
    main()
