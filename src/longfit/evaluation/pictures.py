"""The pictures of a report, drawn by matplotlib from plain numbers: the same figure as SVG for the page and as PNG.

Three states keep their colours in every picture (and differ in their line, for those who do not see colours): the base
is grey and dashed, the extended base ochre, the tuned model blue. Text stays text in the SVG, so that it can be
selected and searched.
"""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from longfit.evaluation.compare import Comparison
from longfit.evaluation.passkey import PasskeyResult
from longfit.training.best import best_of

LOOKS: dict[str, dict[str, Any]] = {
    "base": {"color": "#7a7a7a", "linestyle": "--", "marker": "s"},
    "extended": {"color": "#c98a1b", "linestyle": "-.", "marker": "^"},
    "tuned": {"color": "#1f6fb2", "linestyle": "-", "marker": "o"},
}
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
}
COLD, WARM = "#f4ead7", "#1f6fb2"  # of the heat maps: not found, found


def draw_perplexity(comparison: Comparison) -> Any:
    """Perplexity by position in the window, one line a state, on a logarithmic scale."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.9), layout="constrained")
        axes = figure.subplots()
        for state in comparison.states:
            buckets = state.long.by_position
            centres = [(bucket.start + bucket.stop) / 2 for bucket in buckets]
            axes.plot(centres, [bucket.perplexity for bucket in buckets], label=state.name, **LOOKS[state.name])
        if comparison.native_context < comparison.window:
            axes.axvline(comparison.native_context, color="black", linewidth=1, linestyle=":")
            axes.annotate(
                f"native context {comparison.native_context:,}",
                (comparison.native_context, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-4, -4),
                textcoords="offset points",
                ha="right",
                va="top",
                color="#555555",
            )
        axes.set(xlabel="position in the window (tokens)", ylabel="perplexity", xlim=(0, comparison.window))
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        _plain_ticks(axes)
        axes.legend(loc="best")
        return figure


def draw_passkey(results: Mapping[str, PasskeyResult]) -> Any:
    """One heat map a state: depth downwards, length to the right; trials won and the loss of the key in every cell."""
    import matplotlib as mpl
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "axes.grid": False}):
        colours = LinearSegmentedColormap.from_list("found", [COLD, WARM])
        first = next(iter(results.values()))
        lengths, depths = (sorted({getattr(cell, name) for cell in first.cells}) for name in ("length", "depth"))
        figure = Figure(figsize=(4.2 * len(results), 1.4 + 0.6 * len(depths)), layout="constrained")
        for axes, (name, result) in zip(
            figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
        ):
            place = {(cell.length, cell.depth): cell for cell in result.cells}
            grid = [[place[length, depth].accuracy for length in lengths] for depth in depths]
            edges = [[index - 0.5 for index in range(len(side) + 1)] for side in (lengths, depths)]
            axes.pcolormesh(*edges, grid, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=3)
            axes.invert_yaxis()
            for row, depth in enumerate(depths):
                for column, length in enumerate(lengths):
                    cell = place[length, depth]
                    ink = "white" if cell.accuracy > 0.6 else "#333333"
                    text = f"{cell.num_correct} of {cell.num_trials}\n{cell.key_nll:.1f} nats"
                    axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axes.set(xlabel="length (tokens)", ylabel="depth of the key", title=name)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        return figure


def draw_training(records: Sequence[Mapping[str, Any]]) -> Any:
    """Loss by step with its validation, and below it the memory that the process had held at most."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [record for record in records if "loss" in record]
    checks = [record for record in records if "eval_loss" in record]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        marker = "o" if len(steps) <= 60 else ""
        numbers = [record["step"] for record in steps]
        above.plot(numbers, [record["loss"] for record in steps], color="#1f6fb2", marker=marker, label="training")
        if checks:
            above.plot(
                [record["step"] for record in checks],
                [record["eval_loss"] for record in checks],
                color="#b23a1f",
                marker="D",
                linestyle="--",
                label="validation",
            )
            best = best_of([dict(check) for check in checks])
            if best is not None:
                above.axvline(best.step, color="#b23a1f", alpha=0.4, linewidth=1, label=f"best, step {best.step:,}")
            above.legend()
        above.set(ylabel="loss (nats)", title="loss")
        peaks = [record["peak_memory_bytes"] / 2**30 for record in steps]
        below.fill_between(numbers, peaks, color="#1f6fb2", alpha=0.2, step=None)
        below.plot(numbers, peaks, color="#1f6fb2", marker=marker)
        below.set(xlabel="step", ylabel="GiB", title="most memory held so far", ylim=(0, None))
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        return figure


def _plain_ticks(axes: Any) -> None:
    """Numbers instead of powers of ten, for perplexities that often span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def svg_of(figure: Any, name: str) -> str:
    """A figure as an SVG element that can stand in a page beside others, the same bytes every time."""
    import matplotlib as mpl

    buffer = StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):  # or names of parts would be drawn at random
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
