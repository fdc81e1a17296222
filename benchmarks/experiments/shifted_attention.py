"""Experiment 3: what shifted attention costs and brings (LongLoRA, section 3.2).

Brings: time, against exact attention, at several window lengths, groups of a quarter of the window. All 30 layers are
alike, so two of them are timed, and the loss once: a step is 30 layers and the loss. Costs: held-out loss, always with
exact attention, after equal numbers of tokens and after equal time. The trainings are those of experiment 2, with
linear interpolation, where there is most to learn. The figure says how far shifted attention carries information at
all: (L + 1) G / 2 tokens through L layers with groups of G.

Times are processor time of all threads together, exact and shifted in turn, so that they mean something on a machine
that others use. The same step has the same work whatever its text.

    python -m benchmarks.experiments.shifted_attention            shifted_attention.json, figure, page
    python -m benchmarks.experiments.shifted_attention --quick    small windows: a smoke test
"""

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import mean, median
from typing import Any

import torch
from benchmarks.experiments.cells import RESULTS, Cells, Settings
from benchmarks.experiments.extension_cells import LORA, NATIVE
from benchmarks.experiments.extension_page import against_exact, mean_nll
from benchmarks.experiments.figures import panels
from benchmarks.experiments.pages import rows, write
from benchmarks.experiments.texts import reference
from benchmarks.experiments.training import Recipe, trainable
from torch import Tensor

from longfit.attention.hf_attention import attention_key
from longfit.engine.hf_model import base_model, decoder, hidden_states
from longfit.engine.loss.training_loss import training_loss
from longfit.numerics.shifted_attention import receptive_field

LAYERS, TIMED_LAYERS = 30, 2
WINDOWS = (2048, 4096, 8192, 16_384, 32_768)


def cells(windows: tuple[int, ...], turns: int) -> Iterator[Settings]:
    yield {"part": "loss", "window": windows[0], "turns": turns}
    for window in windows:
        yield {"part": "layers", "window": window, "group_size": window // 4, "turns": turns}


def measure(settings: Settings) -> dict[str, Any]:
    """Processor time of a layer with exact and with shifted attention, or of the loss, in each turn."""
    model, tokenizer = trainable(Recipe(context=max(NATIVE, settings["window"])))
    decoder(model).layers = decoder(model).layers[:TIMED_LAYERS]
    base_model(model).enable_input_require_grads()  # as the layers above the first one do for it
    ids = reference(tokenizer)[: settings["window"]]
    if settings["part"] == "loss":
        turns = [
            cpu_s(lambda: training_loss(model, ids[None], engine="plain")) - layers_cpu_s(model, ids)
            for _ in range(settings["turns"])
        ]
        return {"cpu_s": turns}
    times: dict[str, list[float]] = {"exact": [], "shifted": []}
    for _ in range(settings["turns"]):
        for attention, seconds in times.items():
            group_size = settings["group_size"] if attention == "shifted" else None
            base_model(model).set_attn_implementation(attention_key(attention, group_size))
            seconds.append(layers_cpu_s(model, ids) / TIMED_LAYERS)
    return {"layer_cpu_s": times, "reach": receptive_field(LAYERS, settings["group_size"])}


def layers_cpu_s(model: Any, ids: Tensor) -> float:
    """Processor time of the layers alone, forward and backward."""
    return cpu_s(lambda: hidden_states(model, input_ids=ids[None], use_cache=False)[0].float().square().mean())


def cpu_s(forward: Callable[[], Tensor]) -> float:
    """Processor time of a scalar and its gradients."""
    began = time.process_time()
    forward().backward()
    return time.process_time() - began


def step_cpu_s(found: Cells, settings: Settings, attention: str) -> float | None:
    """Processor time of a whole training step; None if the loss was not timed yet."""
    layers, loss = found.find(settings), found.select(part="loss")
    if layers is None or not loss:
        return None
    loss_s = median(loss[0]["result"]["cpu_s"]) * settings["window"] / loss[0]["settings"]["window"]
    return LAYERS * median(layers["layer_cpu_s"][attention]) + loss_s


def by_window(found: Cells) -> list[Settings]:
    return sorted((row["settings"] for row in found.select(part="layers")), key=lambda row: row["window"])


def table(found: Cells) -> str:
    """Time of a layer and of a step, by window."""
    body = []
    for settings in by_window(found):
        result = found.find(settings)
        assert result is not None
        exact, shifted = (step_cpu_s(found, settings, name) for name in ("exact", "shifted"))
        layer = median(result["layer_cpu_s"]["exact"]) / median(result["layer_cpu_s"]["shifted"])
        line = [f"{settings['window']:,}", f"{settings['group_size']:,}", f"{result['reach']:,}"]
        whole = [f"{exact:.0f} s", f"{shifted:.0f} s"] if exact and shifted else ["", ""]
        body.append([*line, *whole, f"{layer:.2f}", f"{exact / shifted:.2f}" if exact and shifted else ""])
    head = ["window", "group", "reach", "step, exact", "step, shifted", "layer: exact / shifted"]
    return rows([*head, "step: exact / shifted"], body)


def spread(found: Cells) -> float:
    """The most that turns of one cell differ, as a share."""
    times = [turns for row in found.select(part="layers") for turns in row["result"]["layer_cpu_s"].values()]
    return max(max(turns) / min(turns) - 1 for turns in times)


def trainings(extension: Cells) -> list[dict[str, Any]]:
    return extension.select(part="training", rope="linear", trained=LORA)


def table_of_trainings(extension: Cells) -> str:
    """Held-out loss at equal numbers of tokens, and what the steps took."""
    body = []
    steps: list[int] = []
    for record in trainings(extension):
        settings, result = record["settings"], record["result"]
        steps = [look["step"] for look in result["looks"]]
        losses = [f"{mean(look['nll'].values()):.3f}" for look in result["looks"]]
        long = f"{mean_nll(result['by_position']):.3f}"
        seconds = f"{sum(result['step_cpu_s']):.0f} s"
        body.append([settings["attention"], str(settings["seed"]), *losses, long, seconds])
    head = ["attention", "seed", *(f"after {step} steps" for step in steps), "a document of 12,288 tokens"]
    return rows([*head, "steps, processor time"], body)


def page_values(found: Cells, extension: Cells) -> dict[str, str]:
    """The numbers of docs/explanation/shifted-attention.md."""
    behind, error = against_exact(extension, LORA, "shifted")
    steps_s = [
        sum(record["result"]["step_cpu_s"])
        for attention in ("exact", "shifted")
        for record in extension.select(part="training", rope="linear", trained=LORA, attention=attention, seed=0)
    ]
    gains = {settings["window"]: step_gain(found, settings) for settings in by_window(found)}
    return {
        "times": table(found),
        "trainings": table_of_trainings(extension),
        "behind": f"{behind:.2f}",
        "behind error": f"{error:.2f}",
        "time saved": f"{1 - steps_s[1] / steps_s[0]:.0%}",
        "spread": f"{spread(found):.0%}",
        "gain at 4k": f"{gains[4096]:.1f}",
        "gain at 16k": f"{gains[16_384]:.1f}",
    }


def step_gain(found: Cells, settings: Settings) -> float:
    """Exact over shifted."""
    exact, shifted = (step_cpu_s(found, settings, name) for name in ("exact", "shifted"))
    if exact is None or shifted is None:
        raise LookupError("the loss was not timed yet; run this without --draw")
    return exact / shifted


def draw(found: Cells, extension: Cells) -> None:
    """Time of a step, and the gain with the reach; then, once there are trainings, loss over tokens and over time."""
    trained = bool(trainings(extension))
    with panels("shifted-attention.png", 4 if trained else 2) as every:
        draw_times(found, every[0], every[1])
        if trained:
            draw_losses(extension, every[2], every[3])


def draw_times(found: Cells, left: Any, right: Any) -> None:
    rows = by_window(found)
    windows = [row["window"] for row in rows]
    seconds = {name: [step_cpu_s(found, row, name) or 0.0 for row in rows] for name in ("exact", "shifted")}
    for attention, colour in (("exact", "C0"), ("shifted", "C3")):
        per_token = [1000 * s / window for s, window in zip(seconds[attention], windows, strict=True)]
        left.plot(windows, per_token, marker="o", color=colour, label=attention)
    left.set(ylabel="processor time (ms a token)", title="one training step", ylim=(0, None))
    left.legend(fontsize=8)
    gains = [exact / shifted for exact, shifted in zip(seconds["exact"], seconds["shifted"], strict=True) if shifted]
    right.plot(windows[: len(gains)], gains, marker="o", color="black")
    for row, gain in zip(rows, gains, strict=False):
        text = f"reach {receptive_field(LAYERS, row['group_size']):,}"
        right.annotate(text, (row["window"], gain), xytext=(-6, 8), textcoords="offset points", ha="right", fontsize=8)
    right.set(
        ylabel="exact / shifted",
        title="gain, groups of a quarter, and their reach",
        ylim=(1, 1.08 * max(gains, default=2)),
    )
    for axes in (left, right):
        axes.set(xscale="log", xlabel="window (tokens)", xlim=(1300, None))
        axes.set_xticks(windows, [f"{window // 1024}k" for window in windows])
        axes.minorticks_off()


def draw_losses(extension: Cells, left: Any, right: Any) -> None:
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
        left.plot([step * settings["window"] for step in steps], losses, label=name, **style)
        right.plot(spent, losses, **style)
        reach = receptive_field(LAYERS, settings["window"] // 4)
        left.set(title=f"windows of {settings['window']:,}: reach {reach:,} tokens")
    left.set(xlabel="tokens trained on", ylabel="held-out loss, exact attention")
    right.set(xlabel="processor time (s)", title="the same over time")
    left.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--draw", action="store_true", help="only draw and write what was measured")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = Cells(RESULTS / f"shifted_attention{'_quick' * arguments.quick}.json")
    if not arguments.draw:
        found.run(cells((256, 512), 1) if arguments.quick else cells(WINDOWS, 2), measure)
    extension = Cells(RESULTS / "extension.json")
    print(table(found))
    if not arguments.quick:
        draw(found, extension)
        write("shifted-attention.md", page_values(found, extension))


if __name__ == "__main__":
    main()
