"""What ``longfit merge`` and ``longfit export`` have in common: their options, and the table of the drift."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longfit.cli.output import print_lines, print_table

if TYPE_CHECKING:
    from longfit.evaluation.drift import Drift

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or an adapter folder.")]
Out = Annotated[Path, typer.Option(help="The folder to make.", show_default=False)]
Checkpoint = Annotated[
    str | None, typer.Option(help="last, or a folder below checkpoints/. Default: the run's result.")
]
Base = Annotated[str | None, typer.Option(help="Where the base is now, if it has moved.")]
Text = Annotated[str | None, typer.Option(help="Measure on this file or folder. Default: the run's held-out text.")]
Tokens = Annotated[str, typer.Option(help="Of it.")]
Measure = Annotated[bool, typer.Option(help="Measure how far the result drifts from the trained model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def print_drift(rows: tuple[Drift, ...], text: str) -> None:
    """Print the drift table, if there is one."""
    if not rows:
        return
    print_lines(f"drift over {rows[0].num_tokens:,} tokens of {text}:")
    print_table(
        ("model", "KL to the trained model", "perplexity", "same greedy token"),
        [(row.name, f"{row.kl:.2e}", f"{row.perplexity:.3f}", f"{row.same_greedy:.2%}") for row in rows],
    )
