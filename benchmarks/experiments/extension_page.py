"""What experiment 2 found, as tables and figures of docs/explanation/extension.md.

Cells that were not measured are left out of tables and figures; a number within a sentence must be there.
"""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.experiments.cells import Cells, Settings
from benchmarks.experiments.extension_cells import (
    EMBEDDINGS,
    FINISHED,
    LORA,
    NATIVE,
    NORMS,
    ROPES,
    TRAINED_READ,
    all_cells,
)
from benchmarks.experiments.figures import count_tokens, panels
from benchmarks.experiments.pages import rows

from longfit.evaluation.report import GUESS_NATS

Buckets = Sequence[dict[str, float]]
NAMES = {"none": "none", "yarn": "YaRN", "linear": "linear", "ntk": "NTK", "theta": "theta"}
COLOURS = {"none": "black", "yarn": "C0", "linear": "C1", "ntk": "C2", "theta": "C4"}
SEEDS = (0, 1)
NEAR, FAR = 2 * NATIVE, 4 * NATIVE


# ------------------------------------------------------------------------------------------------ numbers
def mean_nll(buckets: Buckets, start: int = 0, stop: float = math.inf) -> float:
    """Loss of the positions ``[start, stop)``, whose bounds are bounds of buckets."""
    inside = [bucket for bucket in buckets if start <= bucket["start"] and bucket["stop"] <= stop]
    tokens = sum(bucket["num_tokens"] for bucket in inside)
    return sum(bucket["num_tokens"] * bucket["nll"] for bucket in inside) / tokens


def mean_perplexity(buckets: Buckets, start: int = 0, stop: float = math.inf) -> float:
    """Its exponential."""
    return math.exp(mean_nll(buckets, start, stop))


def untrained(found: Cells, rope: str, context: int = NEAR, document: str = "tarfile") -> Buckets | None:
    """The model with scaled positions as it is, over the whole document."""
    records = found.select(part="positions", rope=rope, context=context, document=document)
    return next((r["result"]["by_position"] for r in records if "tokens" not in r["settings"]), None)


def trained(found: Cells, rope: str, what: str, attention: str, seed: int) -> dict[str, Any] | None:
    """The result of one training."""
    records = found.select(part="training", rope=rope, trained=what, attention=attention, seed=seed)
    return records[0]["result"] if records else None


def paired(buckets: Buckets, others: Buckets) -> tuple[float, float]:
    """Loss over another's, in nats a token: mean over the buckets and its standard error."""
    differences = [ours["nll"] - theirs["nll"] for ours, theirs in zip(buckets, others, strict=True)]
    return mean(differences), stdev(differences) / math.sqrt(len(differences))


# ------------------------------------------------------------------------------------------------ tables
def table_of_positions(found: Cells, context: int, document: str) -> str:
    """Perplexity by position, one row a scaling."""
    body, head = [], ["positions"]
    for rope in ROPES:
        buckets = untrained(found, rope, context, document)
        if buckets is not None:
            body.append([NAMES[rope], *(number(math.exp(bucket["nll"])) for bucket in buckets)])
            head = ["positions", *(f"to {bucket['stop']:,.0f}" for bucket in buckets)]
    return rows(head, body)


def table_of_short_context(found: Cells) -> str:
    """What a scaling costs in the first bucket."""
    head, body = ["scaled for", *(NAMES[rope] for rope in ROPES)], []
    for context in (NEAR, FAR):
        line = [f"{context:,}"]
        for rope in ROPES:
            records = found.select(part="positions", rope=rope, context=context, document="tarfile")
            line.append(number(math.exp(records[0]["result"]["by_position"][0]["nll"])) if records else "")
        body.append(line)
    return rows(head, body)


def table_of_trainings(found: Cells) -> str:
    """Perplexity after training, and the loss over that of adapters alone with exact attention and the same seed."""
    body = []
    for rope in ("linear", "yarn"):
        before = untrained(found, rope)
        if before is not None:
            body.append([NAMES[rope], "nothing", "", "", *halves(before), "", ""])
        for record in sorted(found.select(part="training", rope=rope), key=_place):
            settings, result = record["settings"], record["result"]
            reference = trained(found, rope, LORA, "exact", settings["seed"])
            is_reference = settings["trained"] == LORA and settings["attention"] == "exact"
            compared = ""
            if reference is not None and not is_reference:
                difference, error = paired(result["by_position"], reference["by_position"])
                compared = f"{difference:+.3f} ± {error:.3f}"
            body.append(
                [
                    NAMES[rope],
                    settings["trained"],
                    settings["attention"],
                    str(settings["seed"]),
                    *halves(result["by_position"]),
                    compared,
                    f"{sum(result['step_cpu_s']):.0f} s",
                ]
            )
    head = ["positions", "trained", "attention", "seed", f"to {NATIVE:,}", f"to {TRAINED_READ:,}"]
    return rows([*head, "loss over LoRA, exact", "steps, processor time"], body)


def _place(record: dict[str, Any]) -> tuple[int, int, int]:
    settings = record["settings"]
    what, attention = (LORA, NORMS, EMBEDDINGS), ("exact", "shifted", FINISHED)
    return what.index(settings["trained"]), attention.index(settings["attention"]), settings["seed"]


def halves(buckets: Buckets) -> tuple[str, str]:
    """Perplexity inside and beyond the native context."""
    return number(mean_perplexity(buckets, 0, NATIVE)), number(mean_perplexity(buckets, NATIVE, TRAINED_READ))


def table_of_retrieval(found: Cells) -> str:
    """Pass keys found of those hidden, and the loss of the key, by length, depth and scaling."""
    head, body = ["length", "positions", "found", "loss of the key (nats) by depth, and trials"], []
    for record in sorted(found.select(part="passkey"), key=lambda record: record["settings"]["length"]):
        cells = record["result"]["cells"]
        won, trials = (sum(cell[name] for cell in cells) for name in ("num_correct", "num_trials"))
        by_depth = ", ".join(f"{cell['depth']:.0%}: {cell['key_nll']:.1f} ({cell['num_trials']})" for cell in cells)
        settings = record["settings"]
        body.append([f"{settings['length']:,}", NAMES[settings["rope"]], f"{won} of {trials}", by_depth])
    return rows(head, body or [["not measured yet", "", "", ""]])


def number(value: float) -> str:
    """A perplexity for people."""
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


# ------------------------------------------------------------------------------------------------ figures
def draw(found: Cells) -> None:
    """Both figures of the page."""
    draw_positions(found)
    if found.select(part="training"):
        draw_training(found)


def draw_positions(found: Cells) -> None:
    """Perplexity by position for every scaling; one panel for each document and context."""
    shown = [(NEAR, "tarfile"), (NEAR, "turtle"), (FAR, "turtle")]
    shown = [panel for panel in shown if any(untrained(found, rope, *panel) is not None for rope in ROPES)]
    with panels("extension-positions.png", len(shown)) as every:
        for axes, (context, name) in zip(every, shown, strict=True):
            for rope in ROPES:
                buckets = untrained(found, rope, context, name)
                if buckets is not None:
                    curve(axes, buckets, color=COLOURS[rope], label=NAMES[rope])
            finish(axes, f"{name}, scaled for {context:,}")


def draw_training(found: Cells) -> None:
    """Perplexity by position after training, over that of the same positions untrained."""
    with panels("extension-training.png", 2) as every:
        for axes, rope in zip(every, ("linear", "yarn"), strict=True):
            before = untrained(found, rope)
            if before is not None:
                curve(axes, before, color="black", label="no training")
            for record in found.select(part="training", rope=rope):
                settings = record["settings"]
                curve(
                    axes,
                    record["result"]["by_position"],
                    color={"exact": "C0", "shifted": "C3", FINISHED: "C2"}[settings["attention"]],
                    linestyle={LORA: "-", NORMS: "--", EMBEDDINGS: "-."}[settings["trained"]],
                    alpha=0.4 if settings["seed"] else 1.0,
                    label=f"{settings['trained']}, {settings['attention']}" if not settings["seed"] else None,
                )
            finish(axes, f"trained, positions {NAMES[rope]} (other seeds paler)")


def curve(axes: Any, buckets: Buckets, **style: Any) -> None:
    """Perplexity over the middle of each bucket."""
    centres = [(bucket["start"] + bucket["stop"]) / 2 for bucket in buckets]
    axes.plot(centres, [math.exp(bucket["nll"]) for bucket in buckets], marker="o", **style)


def finish(axes: Any, title: str) -> None:
    """Scales, native context and words of a panel."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_ylim()
    axes.axvline(NATIVE, color="grey", linestyle=":", linewidth=1.2, label="native context")
    axes.set(yscale="log", xlabel="position (tokens)", ylabel="perplexity", title=title, xlim=(0, None))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    count_tokens(axes)
    axes.legend(fontsize=8)


# ------------------------------------------------------------------------------------------------ the page
def table_of_missing(found: Cells) -> str:
    """The cells that were not measured yet, in the order in which the command goes on."""
    left: dict[str, list[str]] = {}
    for cell in all_cells():
        if found.find(cell) is None:
            left.setdefault(cell["part"], []).append(_in_words(cell))
    return rows(["part", "not measured yet"], [[part, "; ".join(cells)] for part, cells in left.items()])


def _in_words(cell: Settings) -> str:
    rope = NAMES[cell["rope"]]
    if cell["part"] == "training":
        return f"{rope}, {cell['trained']}, {cell['attention']}, seed {cell['seed']}"
    if cell["part"] == "passkey":
        return f"{rope}, {cell['length']:,} tokens"
    return f"{rope} for {cell['context']:,} on {cell['document']}, {cell.get('tokens', cell['context']):,} tokens"


def page_values(found: Cells) -> dict[str, str]:
    """The numbers of docs/explanation/extension.md."""
    none, yarn = _needed(untrained(found, "none")), _needed(untrained(found, "yarn"))
    inside = [
        math.exp(scaled["nll"] - plain["nll"]) - 1
        for scaled, plain in zip(yarn, none, strict=True)
        if plain["stop"] <= NATIVE
    ]
    exact = _needed(trained(found, "linear", LORA, "exact", 0))["by_position"]
    untrained_linear = found.select(part="positions", rope="linear", context=NEAR, document="tarfile")[0]["result"]
    shifted, shifted_error = against_exact(found, LORA, "shifted")
    return {
        "positions": table_of_positions(found, NEAR, "tarfile"),
        "short context": table_of_short_context(found),
        "trainings": table_of_trainings(found),
        "retrieval": table_of_retrieval(found),
        "missing": table_of_missing(found),
        **gain_of_norms(found),
        "guess": f"{GUESS_NATS:.1f}",
        "last none": number(math.exp(none[-1]["nll"])),
        "last yarn": number(math.exp(yarn[-1]["nll"])),
        "cost inside": f"{min(inside):.0%} to {max(inside):.0%}",
        "linear first": number(math.exp(untrained_linear["by_position"][0]["nll"])),
        "linear trained first": number(math.exp(exact[0]["nll"])),
        "linear trained": number(mean_perplexity(exact, 0, NATIVE)),
        "yarn inside": number(mean_perplexity(yarn, 0, NATIVE)),
        "yarn trained": number(
            mean_perplexity(_needed(trained(found, "yarn", LORA, "exact", 0))["by_position"], 0, NATIVE)
        ),
        "shifted": f"{shifted:.2f}",
        "shifted error": f"{shifted_error:.2f}",
    }


def against_exact(
    found: Cells, what: str, attention: str, *, rope: str = "linear", seed: int = 0
) -> tuple[float, float]:
    """Loss of a training over that of adapters alone with exact attention and the same seed; standard error."""
    ours, theirs = (trained(found, rope, *recipe, seed) for recipe in ((what, attention), (LORA, "exact")))
    return paired(_needed(ours)["by_position"], _needed(theirs)["by_position"])


def gain_of_norms(found: Cells) -> dict[str, str]:
    """What norms bring, seed by seed, in the pairs of trainings that were measured."""
    values, dearer = {}, []
    for rope in ("linear", "yarn"):
        both = [seed for seed in SEEDS if all(trained(found, rope, what, "exact", seed) for what in (NORMS, LORA))]
        gains = [against_exact(found, NORMS, "exact", rope=rope, seed=seed) for seed in both]
        for seed in both:
            times = [sum(_needed(trained(found, rope, what, "exact", seed))["step_cpu_s"]) for what in (NORMS, LORA)]
            dearer.append(times[0] / times[1] - 1)
        words = " and ".join(f"{-gain:.3f} ± {error:.3f} nats" for gain, error in gains)
        values[f"norms, {rope}"] = words or "not measured yet"
    values["norms, time"] = f"{mean(dearer):.0%}"
    return values


def _needed(result: Any) -> Any:
    if result is None:
        raise LookupError("a cell that the page speaks of was not measured yet; run this without --draw")
    return result
