"""Experiment 4: does training on a 4-bit base lose anything against the 16-bit base? (QLoRA, section 4, table 3)

The same adapters from the same random numbers, the same windows in the same order, the same learning rates; only the
storage of the frozen base differs. Training loss step by step, and the loss on held-out documents before, on the way
and after. Two seeds: each decides adapters and order.

What can be expected: a 4-bit base starts worse, by what its data type costs (experiment 1). QLoRA's claim is that
training closes the gap; here one sees how much of it a short training closes.

    python -m benchmarks.experiments.qlora_vs_lora            results/experiments/qlora_vs_lora.json, figure, page
    python -m benchmarks.experiments.qlora_vs_lora --quick    two steps: a smoke test, qlora_vs_lora_quick.*
"""

import argparse
from collections.abc import Iterator
from statistics import mean
from typing import Any

from benchmarks.experiments.cells import RESULTS, Cells, Settings
from benchmarks.experiments.figures import panels
from benchmarks.experiments.pages import rows, write
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
    """Every training: its loss at both ends, and the held-out loss."""
    body = []
    for record in found.records:
        settings, result = record["settings"], record["result"]
        steps, quarter = settings["steps"], max(1, settings["steps"] // 4)
        losses = [mean(result["loss"][:quarter]), mean(result["loss"][-quarter:])]
        losses += [held_out_mean(result, step) for step in (0, steps // 2, steps)]
        losses.append(losses[2] - losses[-1])
        body.append([NAMES[settings["quant"]], str(settings["seed"]), *(f"{loss:.3f}" for loss in losses)])
    head = ["base", "seed", "training loss, first quarter", "last quarter", "held-out before", "half-way", "after"]
    return rows([*head, "fell by"], body)


def gaps(found: Cells, quant: str, seed: int, step: int) -> dict[str, float]:
    """Held-out loss over that on the 16-bit base, document by document."""
    ours, its = (found.select(quant=name, seed=seed)[0]["result"]["held_out"][str(step)] for name in (quant, "none"))
    return {name: ours[name] - its[name] for name in DOCUMENTS}


def table_of_gaps(found: Cells) -> str:
    """How much of the distance to the 16-bit base a training closes."""
    body = []
    for record in found.records:
        quant, seed, steps = (record["settings"][key] for key in ("quant", "seed", "steps"))
        if quant == "none":
            continue
        before, half, after = (gaps(found, quant, seed, step) for step in (0, steps // 2, steps))
        closed = [before[name] - after[name] for name in DOCUMENTS]
        body.append(
            [
                NAMES[quant],
                str(seed),
                *(f"{mean(gap.values()):.3f}" for gap in (before, half, after)),
                f"{mean(closed):.3f} ({mean(closed) / mean(before.values()):.0%})",
                f"{min(closed):.3f} to {max(closed):.3f}",
            ]
        )
    return rows(["base", "seed", "gap before", "half-way", "after", "closed", "in single documents"], body)


def page_values(found: Cells) -> dict[str, str]:
    """The numbers of docs/explanation/qlora-vs-lora.md."""
    steps = found.records[0]["settings"]["steps"]
    seeds = [record["settings"]["seed"] for record in found.select(quant="nf4")]
    before, after = ([mean(gaps(found, "nf4", seed, step).values()) for seed in seeds] for step in (0, steps))
    closed = [first - last for first, last in zip(before, after, strict=True)]
    falls = {
        quant: mean(
            held_out_mean(record["result"], 0) - held_out_mean(record["result"], steps)
            for record in found.select(quant=quant)
            if record["settings"]["seed"] in seeds
        )
        for quant in ("none", "nf4")
    }
    reference = held_out_mean(found.select(quant="nf4", seed=0)[0]["result"], steps)
    return {
        "trainings": table(found),
        "gaps": table_of_gaps(found),
        "steps": str(steps),
        "window": f"{found.records[0]['settings']['window']:,}",
        "gap": f"{mean(before):.2f}",
        "closed": f"{min(closed):.3f} to {max(closed):.3f}",
        "share": f"{mean(closed) / mean(before):.0%}",
        **{
            f"{quant} behind": f"{held_out_mean(found.select(quant=quant, seed=0)[0]['result'], steps) - reference:.3f}"
            for quant in ("int4", "fp4")
        },
        "faster": f"{falls['nf4'] / falls['none']:.1f}",
    }


def draw(found: Cells) -> None:
    """Training loss, its difference step by step, and held-out loss."""
    with panels("qlora-vs-lora.png", 3) as (left, middle, right):
        for record in found.records:
            settings, result = record["settings"], record["result"]
            quant, seed = settings["quant"], settings["seed"]
            style = {"color": COLOURS[quant], "linestyle": "--" if seed else "-", "alpha": 0.6 if seed else 1.0}
            name = NAMES[quant] + (f", seed {seed}" if seed else "")
            steps = range(1, len(result["loss"]) + 1)
            if not seed:
                left.plot(steps, result["loss"], label=name, **style)
            for base in found.select(quant="none", seed=seed) if quant != "none" else ():
                differences = [ours - its for ours, its in zip(result["loss"], base["result"]["loss"], strict=True)]
                middle.plot(steps, differences, label=name, **style)
            looks = [int(step) for step in result["held_out"]]
            right.plot(looks, [held_out_mean(result, step) for step in looks], marker="o", label=name, **style)
        left.set(title="training loss, seed 0: the same windows")
        middle.set(title="training loss over that on the 16-bit base", ylim=(0, None))
        right.set(title="held-out documents")
        for axes in (left, middle, right):
            axes.set(xlabel="step", ylabel="loss (nats a token)")
            axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--draw", action="store_true", help="only draw and write what was measured")
    arguments = parser.parse_args()
    found = Cells(RESULTS / f"qlora_vs_lora{'_quick' * arguments.quick}.json")
    if not arguments.draw:
        size = {"window": 128, "steps": 2} if arguments.quick else {"window": 1024, "steps": 24}
        found.run(cells(**size), measure)
    print(table(found))
    if not arguments.quick:
        draw(found)
        write("qlora-vs-lora.md", page_values(found))


if __name__ == "__main__":
    main()
