"""Experiment 4: does training on a 4-bit base lose anything against the 16-bit base? (QLoRA, section 4, table 3)

The same adapters from the same random numbers, the same windows in the same order, the same learning rates; only the
storage of the frozen base differs. Training loss step by step, and the loss on held-out documents before, on the way
and after. Two seeds: each decides adapters and order.

What can be expected: a 4-bit base starts worse, by what its data type costs (experiment 1). QLoRA's claim is that
training closes the gap; here one sees how much of it a short training closes.

    python -m benchmarks.experiments.qlora_vs_lora            benchmarks/results/experiments/qlora_vs_lora.json, figure
    python -m benchmarks.experiments.qlora_vs_lora --quick    two steps: a smoke test, qlora_vs_lora_quick.*
"""

import argparse
from collections.abc import Iterator
from statistics import mean
from typing import Any

from benchmarks.experiments.cells import IMAGES, RESULTS, Cells, Settings
from benchmarks.experiments.texts import held_out_documents, held_out_losses, training_windows
from benchmarks.experiments.training import Recipe, train, trainable

DOCUMENTS = ("tarfile", "doctest", "argparse", "turtle")
COLOURS = {"none": "black", "nf4": "C0", "fp4": "C1", "int4": "C2"}
NAMES = {"none": "LoRA, 16-bit base", "nf4": "QLoRA, NF4 + DQ", "fp4": "FP4 + DQ", "int4": "INT4 + DQ"}


def cells(*, window: int, steps: int) -> Iterator[Settings]:
    """The most telling first."""
    for seed, quant in ((0, "none"), (0, "nf4"), (1, "none"), (1, "nf4"), (0, "int4"), (0, "fp4")):
        yield {"quant": quant, "seed": seed, "window": window, "steps": steps}


def measure(settings: Settings) -> dict[str, Any]:
    window, steps = settings["window"], settings["steps"]
    recipe = Recipe(quant=settings["quant"], seed=settings["seed"])
    model, tokenizer = trainable(recipe)
    held_out = held_out_documents(tokenizer, DOCUMENTS, tokens=window)
    losses: dict[str, dict[str, float]] = {}

    def look(step: int) -> None:
        if step in (0, steps // 2, steps):
            losses[str(step)] = held_out_losses(model, held_out)

    look(0)
    windows = training_windows(tokenizer, window=window, number=steps, seed=settings["seed"])
    record = train(model, windows, recipe, after_step=look)
    return {**record, "held_out": losses}


def held_out_mean(result: dict[str, Any], step: int) -> float:
    return mean(result["held_out"][str(step)].values())


def table(found: Cells) -> str:
    """Markdown rows, as in docs/explanation/qlora-vs-lora.md."""
    lines = [
        "| base | seed | training loss, last quarter | held-out before | after | fell by |",
        "|---|---|---|---|---|---|",
    ]
    for record in found.records:
        settings, result = record["settings"], record["result"]
        steps = settings["steps"]
        last = mean(result["loss"][-max(1, steps // 4) :])
        before, after = held_out_mean(result, 0), held_out_mean(result, steps)
        lines.append(
            f"| {NAMES[settings['quant']]} | {settings['seed']} | {last:.4f} | {before:.4f} | {after:.4f}"
            f" | {before - after:.4f} |"
        )
    return "\n".join(lines)


def draw(found: Cells, path: Any) -> None:
    """Training loss, its difference step by step, and held-out loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for record in found.records:
        settings, result = record["settings"], record["result"]
        quant, seed = settings["quant"], settings["seed"]
        style = {"color": COLOURS[quant], "linestyle": "--" if seed else "-"}
        name = NAMES[quant] + (f", seed {seed}" if seed else "")
        steps = range(1, len(result["loss"]) + 1)
        left.plot(steps, result["loss"], label=name, linewidth=1.2, **style)
        for base in found.select(quant="none", seed=seed) if quant != "none" else ():
            differences = [ours - its for ours, its in zip(result["loss"], base["result"]["loss"], strict=True)]
            middle.plot(steps, differences, label=name, **style)
        looks = [int(step) for step in result["held_out"]]
        right.plot(looks, [held_out_mean(result, step) for step in looks], marker="o", label=name, **style)
    left.set(xlabel="step", ylabel="loss (nats a token)", title="training, the same windows in the same order")
    middle.set(xlabel="step", ylabel="loss (nats a token)", title="training loss over that on the 16-bit base")
    middle.set_ylim(bottom=0)
    right.set(xlabel="step", ylabel="loss (nats a token)", title="held-out documents")
    for axes in (left, middle, right):
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    arguments = parser.parse_args()
    found = Cells(RESULTS / f"qlora_vs_lora{'_quick' * arguments.quick}.json")
    if not arguments.draw:
        size = {"window": 128, "steps": 2} if arguments.quick else {"window": 1024, "steps": 24}
        found.run(cells(**size), measure)
    print(table(found))
    if not arguments.quick:
        draw(found, IMAGES / "qlora-vs-lora.png")


if __name__ == "__main__":
    main()
