"""``longfit merge RUN --out DIR``: adapter and base become one model, its drift measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longfit.cli.output import print_json, print_lines, print_note, print_table, show_progress
from longfit.cli.values import read_tokens
from longfit.words import format_bytes

if TYPE_CHECKING:
    from longfit.evaluation.drift import Drift


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or an adapter folder.")],
    out: Annotated[Path, typer.Option(help="The folder to make.", show_default=False)],
    onto: Annotated[str, typer.Option(help="16bit, 4bit, or auto: the one that drifts less.")] = "auto",
    checkpoint: Annotated[
        str | None, typer.Option(help="last, or a folder below checkpoints/. Default: the run's result.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where the base is now, if it has moved.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. Default: as trained.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Measure on this file or folder. Default: the run's held-out text.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Of it.")] = "2048",
    measure: Annotated[bool, typer.Option(help="Measure how far the merged model drifts.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Merge a run's adapter into its base: plain safetensors for transformers, vLLM and the like."""
    count = read_tokens("--tokens", tokens)

    from longfit.exporting.merge import merge as merge_run

    with show_progress(quiet=as_json) as on_event:
        result = merge_run(
            run,
            out,
            onto=onto,
            checkpoint=checkpoint,
            base=base,
            dtype=dtype,
            text=text,
            tokens=count,
            measure=measure,
            on_event=on_event,
        )
    if as_json:
        print_json(result)
        return
    print_drift(result.drift, f"{result.text}, computed in {result.measured_in}")
    print_lines(
        f"{result.out}: merged onto the {result.onto} base ({result.reason}); {result.changed} of {result.num_tensors} "
        f"tensors changed, {format_bytes(result.num_bytes)} in {result.dtype}; {result.tied}"
    )
    for warning in result.warnings:
        print_note(f"warning: {warning}")


def print_drift(rows: tuple[Drift, ...], text: str) -> None:
    """Print the drift table, if there is one."""
    if not rows:
        return
    print_lines(f"drift over {rows[0].num_tokens:,} tokens of {text}:")
    print_table(
        ("model", "KL to the trained model", "perplexity", "same greedy token"),
        [(row.name, f"{row.kl:.2e}", f"{row.perplexity:.3f}", f"{row.same_greedy:.2%}") for row in rows],
    )
