"""The demo's picture and page: perplexity by position before and after, training loss, and the bytes of the base.

One self-contained HTML file with the picture inside, and the same picture as PNG. Plain functions of the numbers.
"""

import html
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from longfit.words import format_bytes

STYLE = """:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
div{overflow-x:auto}table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.3rem .8rem;border-bottom:1px solid #8886;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}
svg{max-width:100%;height:auto;background:#fff;border-radius:8px}
code{background:#8882;padding:.1rem .3rem;overflow-wrap:anywhere}"""


def write_report(run_dir: Path, result: dict[str, Any], losses: Sequence[float]) -> None:
    """Write ``report.html``, ``perplexity.png`` and ``demo.json`` into the run directory."""
    figure = draw(result, losses)
    figure.savefig(run_dir / "perplexity.png", dpi=150)
    buffer = StringIO()
    figure.savefig(buffer, format="svg")
    picture = buffer.getvalue()
    page = PAGE.format(
        style=STYLE,
        title=f"SmolLM2-135M read to {result['context']:,} tokens",
        summary=html.escape(" ".join(summary_lines(result))),
        picture=picture[picture.index("<svg") :],
        table=html_table(table(result)),
        commands="".join(f"<li><code>{html.escape(command)}</code></li>" for command in result["next_commands"]),
    )
    (run_dir / "report.html").write_text(page, encoding="utf-8")
    (run_dir / "demo.json").write_text(json.dumps(result, indent=2), encoding="utf-8")


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{style}</style>
<h1>{title}</h1><p>{summary}</p>{picture}
<h2>Perplexity by position, held-out text, exact attention</h2><div>{table}</div>
<h2>Next</h2><ul>{commands}</ul></html>
"""


def draw(result: dict[str, Any], losses: Sequence[float]) -> Any:
    """A matplotlib figure: perplexity by position on the left, training loss on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    bucket = result["bucket_tokens"]
    for stage in result["stages"]:
        centres = [(index + 0.5) * bucket for index in range(len(stage["by_position"]))]
        left.plot(centres, stage["by_position"], marker="o", label=stage["name"])
    left.axvline(result["native_context"], color="grey", linestyle=":", label="native context")
    left.set(yscale="log", xlabel="position (tokens)", ylabel="perplexity", title="held-out text, exact attention")
    left.legend(frameon=False)
    right.plot(range(1, len(losses) + 1), losses, marker="o", color="black")
    right.set(xlabel="step", ylabel="training loss", title="shifted attention", xticks=range(1, len(losses) + 1))
    return figure


def table(result: dict[str, Any]) -> list[list[str]]:
    """Header and rows: one row per position bucket, one column per stage."""
    bucket, stages = result["bucket_tokens"], result["stages"]
    rows = [["tokens", *(stage["name"] for stage in stages)]]
    for index in range(len(stages[0]["by_position"])):
        span = f"{index * bucket:,} to {min((index + 1) * bucket, result['context']):,}"
        rows.append([span, *(f"{stage['by_position'][index]:,.1f}" for stage in stages)])
    return [*rows, ["all", *(f"{stage['perplexity']:,.1f}" for stage in stages)]]


def summary_lines(result: dict[str, Any]) -> list[str]:
    """What was measured, in sentences."""
    half, small = result["half_bytes"], result["quantized_bytes"]
    losses = ", then ".join(f"{loss:.3f}" for loss in result["pass_losses"])
    return [
        f"The base takes {small / 1e6:.0f} MB with NF4 linear layers instead of {half / 1e6:.0f} MB in 16 bits.",
        f"Training loss by pass over the text: {losses}.",
        f"{result['steps']} steps on windows of {result['context']:,} tokens, computed in {result['dtype']}"
        f" ({result['processor']}).",
        f"Training ran at {result['tokens_per_s']:,.0f} tokens/s with groups of {result['group_size']:,} tokens;",
        f"the process peaked at {format_bytes(result['peak_memory_bytes'])}; all took {result['seconds']:.0f} s.",
    ]


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of them the header, as an HTML table."""
    head, *body = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in body)
    return f"<table><tr>{cells}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
