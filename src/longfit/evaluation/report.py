"""The report of a run: one page that says whether the model reads further, with its pictures inside.

``report.html`` needs nothing but a browser: no script, no request. Beside it lie the pictures as PNG and every number
as ``report.json``. The page leads with the answer in words, then shows each measure with the table behind it, says what
it cannot show, and ends with the commands that make it again.
"""

import html
import json
import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longfit.evaluation.compare import Comparison, State
from longfit.evaluation.passkey_prompts import HIGH, LOW
from longfit.evaluation.pictures import draw_passkey, draw_perplexity, draw_training, svg_of
from longfit.files.writing import write_text
from longfit.training.best import best_of, reason_to_stop
from longfit.training.metrics import read_metrics
from longfit.training.run_directory import read_config
from longfit.training.samples import read_samples
from longfit.words import format_bytes

GUESS_NATS = math.log(HIGH - LOW + 1)  # of a pass key, drawn evenly
VERDICTS = {
    "better": "The tuned model is better inside the native context",
    "worse": "The tuned model is worse inside the native context",
    "unchanged": "Inside the native context nothing changed that one would notice",
    "unclear": "Inside the native context the difference is smaller than what these windows can tell",
}


def write_report(comparison: Comparison, *, command: str) -> Path:
    """Write ``report.html``, ``report.json`` and the pictures into the run directory.

    Args:
        comparison: from `compare`.
        command: the line that made it.
    Returns: the page.
    """
    run_dir = Path(comparison.run_dir)
    records: list[dict[str, Any]] = [dict(record) for record in read_metrics(run_dir / "metrics.jsonl")]
    figures = {"perplexity": draw_perplexity(comparison)}
    found = {state.name: state.passkey for state in comparison.states if state.passkey is not None}
    if found:
        figures["passkey"] = draw_passkey(found)
    if any("loss" in record for record in records):
        figures["training"] = draw_training(records)
    for name, figure in figures.items():
        figure.savefig(run_dir / f"{name}.png", dpi=150)
    pictures = {name: svg_of(figure, name) for name, figure in figures.items()}
    commands = [command, training_command(run_dir)]
    write_text(run_dir / "report.json", json.dumps(asdict(comparison) | {"commands": commands}, indent=1) + "\n")
    page = run_dir / "report.html"
    settings, samples = read_config(run_dir).flat(), read_samples(run_dir / "samples.jsonl")
    write_text(page, render(comparison, pictures, records, samples, commands=commands, settings=settings))
    return page


def training_command(run_dir: Path) -> str:
    """The line that would train this run again, beside it; its settings come from its own config."""
    flat = read_config(run_dir).flat()
    words = [str(flat["model.name"]), str(flat["data.path"]), str(run_dir / "config.yaml")]
    return shlex.join(["longfit", "train", *words, "--run-dir", f"{run_dir}-again"])


def summary(comparison: Comparison) -> list[str]:
    """The answer in sentences, the most important first; also what the command line prints."""
    base, tuned = comparison.states[0], comparison.states[-1]
    lines = [
        f"Over {comparison.window:,} tokens the tuned model predicts the text at perplexity"
        f" {number(tuned.long.perplexity)}, the base at {number(base.long.perplexity)}."
    ]
    beyond = [_beyond(state, comparison.native_context) for state in (base, tuned)]
    if None not in beyond:
        lines.append(
            f"Beyond the native context of {comparison.native_context:,} tokens: {number(beyond[1])} against"
            f" {number(beyond[0])}."
        )
    if base.passkey is not None and tuned.passkey is not None:
        won = [f"{sum(cell.num_correct for cell in p.cells)} of {len(p.trials)}" for p in (tuned.passkey, base.passkey)]
        lost = [number(statistics.fmean(trial.key_nll for trial in p.trials)) for p in (tuned.passkey, base.passkey)]
        lines.append(
            f"Pass keys found: {won[0]} by the tuned model, {won[1]} by the base. Their loss: {lost[0]} nats against"
            f" {lost[1]}; who guesses blindly loses {GUESS_NATS:.1f}."
        )
    short = comparison.short_context
    lines.append(
        f"{VERDICTS[short.verdict]}: perplexity {number(short.tuned)} against {number(short.base)} in"
        f" {short.num_windows} windows of {short.window:,} tokens."
    )
    return lines


def _beyond(state: State, native_context: int) -> float | None:
    """Perplexity of the tokens in buckets that begin at or after the native context."""
    buckets = [bucket for bucket in state.long.by_position if bucket.start >= native_context]
    count = sum(bucket.num_tokens for bucket in buckets)
    return math.exp(min(700.0, sum(bucket.nll * bucket.num_tokens for bucket in buckets) / count)) if count else None


def number(value: float | None) -> str:
    """A perplexity for people."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


# ------------------------------------------------------------------------------------------------ tables
def perplexity_table(comparison: Comparison) -> list[list[str]]:
    """One row a position bucket, one column a state; the header first, all tokens last."""
    rows = [["tokens", *(state.name for state in comparison.states)]]
    for buckets in zip(*(state.long.by_position for state in comparison.states), strict=True):
        rows.append([f"{buckets[0].start:,} to {buckets[0].stop:,}", *(number(b.perplexity) for b in buckets)])
    return [*rows, ["all", *(number(state.long.perplexity) for state in comparison.states)]]


def passkey_table(comparison: Comparison) -> list[list[str]]:
    """One row a cell: trials won with their interval, and the loss of the key, base and tuned."""
    states = [state for state in comparison.states if state.passkey is not None]
    rows = [
        ["length", "depth", *(title for state in states for title in (state.name, f"{state.name}: loss of the key"))]
    ]
    for cells in zip(*(state.passkey.cells for state in states if state.passkey is not None), strict=True):
        values = [
            text
            for cell in cells
            for text in (
                f"{cell.num_correct}/{cell.num_trials} ({cell.low:.0%} to {cell.high:.0%})",
                f"{cell.key_nll:.2f}",
            )
        ]
        rows.append([f"{cells[0].length:,}", f"{cells[0].depth:.0%}", *values])
    return rows


def short_table(comparison: Comparison) -> list[list[str]]:
    """The regression check."""
    short = comparison.short_context
    error = "" if math.isnan(short.standard_error) else f" ± {2 * short.standard_error:.4f}"
    return [
        ["windows", "base", "tuned", "difference (nats a token)"],
        [
            f"{short.num_windows} of {short.window:,} tokens",
            number(short.base),
            number(short.tuned),
            f"{short.difference:+.4f}{error}",
        ],
    ]


def training_table(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What the training cost."""
    steps = [record for record in records if "loss" in record]
    seconds = sum(record["step_s"] for record in steps)
    return [
        ["steps", "tokens", "tokens/s", "first loss", "last loss", "most memory"],
        [
            f"{len(steps):,}",
            f"{sum(record['tokens'] for record in steps):,}",
            f"{sum(record['tokens'] for record in steps) / seconds:,.0f}",
            f"{steps[0]['loss']:.4f}",
            f"{steps[-1]['loss']:.4f}",
            format_bytes(max(record["peak_memory_bytes"] for record in steps)),
        ],
    ]


def how_it_ended(records: Sequence[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    """Sentences on which evaluation was the best, and why the run ended before its last step if it did."""
    lines, best = [], best_of(records)
    if best is not None:
        kept = ", whose adapter is the run's result" if settings["train.keep_best"] else ""
        lines.append(f"The validation loss was lowest after step {best.step:,} ({best.eval_loss:.4f}){kept}.")
    reason = reason_to_stop(records, settings["train.patience"])
    last = max((record["step"] for record in records if "loss" in record), default=0)
    if reason is not None:
        lines.append(f"The run stopped after step {last:,} of {settings['train.steps']:,}: {reason}.")
    return lines


# ------------------------------------------------------------------------------------------------ the page
def render(
    comparison: Comparison,
    pictures: dict[str, str],
    records: Sequence[dict[str, Any]],
    samples: Sequence[dict[str, Any]] = (),
    *,
    commands: Sequence[str],
    settings: dict[str, Any],
) -> str:
    """The whole page as text."""
    first, *others = summary(comparison)
    name = Path(comparison.run_dir).name
    parts = [
        f'<header><p class="kind">longfit report</p><h1>Does <em>{html.escape(name)}</em> read further?</h1>'
        f'<p class="lead">{html.escape(first)}</p></header>',
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in others) + "</ul>",
        _section(
            "Perplexity by position",
            f"Lower is better. {_text_line(comparison)} Attention is exact in every state; each token is scored once,"
            " with all tokens of its window before it (convention: document).",
            pictures["perplexity"],
            perplexity_table(comparison),
        ),
    ]
    if "passkey" in pictures:
        parts.append(
            _section(
                "Passkey retrieval",
                "A five-digit number is hidden in filler text and asked for at the end; a trial is won when the first"
                " number of the greedy answer is the right one. Few trials say little: brackets give the 95 %"
                " interval. The loss of the key (nats, lower is better) moves long before the first trial is won; a"
                f" blind guess among all five-digit numbers loses {GUESS_NATS:.1f} nats.",
                pictures["passkey"],
                passkey_table(comparison),
            )
        )
    parts.append(
        _section(
            "Short texts: did it get worse?",
            f"{VERDICTS[comparison.short_context.verdict]}. Both models read the same windows; the difference is their"
            " mean over windows, with two standard errors.",
            "",
            short_table(comparison),
        )
    )
    if "training" in pictures:
        text = html.escape(" ".join(how_it_ended(records, settings)))
        parts.append(_section("Training", text, pictures["training"], training_table(records)))
    if samples:
        parts.append(_samples(samples))
    parts.append(_made_by(comparison, commands, settings))
    return PAGE.format(title=html.escape(f"{name}: does it read further?"), style=STYLE, body="\n".join(parts))


def _text_line(comparison: Comparison) -> str:
    held_out = "held out by the run" if comparison.held_out else "no document of it is one that the run was trained on"
    held_out = comparison.seen or held_out
    several = "s" if comparison.num_documents != 1 else ""
    return (
        f"Text: {html.escape(comparison.text)} ({comparison.num_tokens:,} tokens of {comparison.num_documents}"
        f" document{several}; {held_out})."
    )


def _section(title: str, text: str, picture: str, table: Sequence[Sequence[str]], *, kind: str = "numbers") -> str:
    figure = f'<figure role="img" aria-label="{html.escape(title)}">{picture}</figure>' if picture else ""
    words = f"<p>{text}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{words}{figure}{html_table(table, kind=kind)}</section>"


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    """What the model answered while it trained, prompt by prompt."""
    rows = [["prompt", "step", "answer"]]
    for prompt in dict.fromkeys(sample["prompt"] for sample in samples):
        rows += [[prompt, f"{s['step']:,}", s["answer"]] for s in samples if s["prompt"] == prompt]
    text = "Greedy answers with exact attention, from the model as it was at that step."
    return _section("What it said while it trained", text, "", rows, kind="words")


def _made_by(comparison: Comparison, commands: Sequence[str], settings: dict[str, Any]) -> str:
    chosen = {key: value for key, value in settings.items() if value not in (None, [], "") and key != "output.run_dir"}
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(value))}</td></tr>" for key, value in chosen.items()
    )
    code = "".join(f"<pre><code>{html.escape(command)}</code></pre>" for command in commands)
    return (
        f"<section><h2>Make it again</h2>{code}<p>Measured on {html.escape(comparison.device)} in"
        f" {comparison.seconds:,.0f} s, base {html.escape(Path(comparison.model).name)}. Every number is in"
        " <code>report.json</code>.</p>"
        f'<details><summary>All settings of the run</summary><table class="settings">{rows}</table></details></section>'
    )


def html_table(rows: Sequence[Sequence[str]], *, kind: str = "numbers") -> str:
    """Rows, the first of them the header, as an HTML table of numbers or words that scrolls on a narrow screen."""
    head, *body = rows
    cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in body)
    inner = f"<thead><tr>{cells}</tr></thead><tbody>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</tbody>"
    return f'<div class="scroll"><table class="{kind}">{inner}</table></div>'


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>{body}</body></html>
"""

STYLE = """
:root{--ink:#1d2329;--soft:#5b6670;--line:#e3e6e9;--ground:#fafaf8;--card:#fff;--accent:#1f6fb2}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a3adb6;--line:#343a40;--ground:#15181b;--card:#1d2125;
--accent:#6db3ec}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);background:var(--ground);
max-width:58rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
.kind{text-transform:uppercase;letter-spacing:.12em;font-size:.75rem;color:var(--soft);margin:0}
h1{font-size:2rem;line-height:1.2;margin:.2rem 0 1rem}h1 em{font-style:normal;color:var(--accent)}
h2{font-size:1.2rem;margin:0 0 .5rem}.lead{font-size:1.2rem;margin:0 0 .5rem}
ul{padding-left:1.2rem;margin:.5rem 0 1.5rem}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1.25rem 1.5rem;margin:1.25rem 0}
section>p{color:var(--soft);margin:0 0 1rem}
figure{margin:0 0 1rem;background:#fff;border-radius:6px;padding:.5rem;overflow-x:auto}
figure svg{width:100%;min-width:36rem;height:auto;display:block}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .9rem .3rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft)}td:first-child,th:first-child,.settings td,.words td,.words th{text-align:left}
.settings td,.words td{white-space:normal;overflow-wrap:anywhere}
tbody tr:last-child td{border-bottom:0}
pre{background:var(--ground);border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem;overflow-x:auto;
margin:0 0 .6rem;font-size:.85rem}
code{font-family:ui-monospace,SFMono-Regular,Menlo,monospace}summary{cursor:pointer;color:var(--accent)}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
