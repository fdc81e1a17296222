"""What ``longfit merge`` and ``longfit export`` have in common: their options, and the table of the drift."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longfit.cli.output import print_lines, print_note, print_table
from longfit.errors import ConfigError

if TYPE_CHECKING:
    from longfit.exporting.export import ExportResult
    from longfit.exporting.merge import MergeResult

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or an adapter folder.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Of data, and model.device.", show_default=False),
]
Out = Annotated[Path, typer.Option(help="The folder to make.", show_default=False)]
Checkpoint = Annotated[
    str | None, typer.Option(help="last, or a folder below checkpoints/. Default: the run's result.")
]
Base = Annotated[str | None, typer.Option(help="Where the base is now, if it has moved.")]
Text = Annotated[str | None, typer.Option(help="Measure on this file or folder. Default: the run's held-out text.")]
Tokens = Annotated[str, typer.Option(help="Of it.")]
Measure = Annotated[bool, typer.Option(help="Measure how far the result drifts; fail if it is not the trained model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def read_words(run: str, words: list[str] | None) -> dict[str, Any]:
    """Read ``section.key=value`` words into the arguments of `merge` and `export` that they decide.

    Raises: ConfigError: wrong settings, or some that would make another model than the one that was trained.
    """
    if not words:
        return {}
    from longfit.training.prepare import target_config

    if not (Path(run) / "config.yaml").is_file():
        raise ConfigError(f"{words[0]}: {run} is an adapter folder, which has no settings; drop it, or name its run")
    for word in words:
        key = word.partition("=")[0]
        if key.startswith("model.") and key != "model.device":
            raise ConfigError(f"{key}: is what the run was trained with; only model.device and data.* act here")
    config = target_config(run, overrides=words)
    import torch

    device = None if config.model.device == "auto" else torch.device(config.model.device)
    return {"config": config, "device": device}


def print_drift(result: MergeResult | ExportResult) -> None:
    """Print the drift table and what the proof found, if anything was measured."""
    if not result.drift:
        return
    print_lines(f"drift over {result.drift[0].num_tokens:,} tokens of {result.text}:")
    print_table(
        ("model", "KL to the trained model", "perplexity", "same greedy token"),
        [(row.name, f"{row.kl:.2e}", f"{row.perplexity:.3f}", f"{row.same_greedy:.2%}") for row in result.drift],
    )
    if result.proof is not None:
        print_lines(f"KL to what it should hold: {result.proof.kl:.2e}; rounding explains {result.proof.bound:.2e}")


def print_warnings(result: MergeResult | ExportResult) -> None:
    """Print what the user should know."""
    for warning in result.warnings:
        print_note(f"warning: {warning}")
