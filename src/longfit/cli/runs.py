"""``longfit runs``: the runs below a directory, newest first."""

import time
from pathlib import Path
from typing import Annotated

import typer

from longfit.cli.output import print_json, print_lines, print_table


def runs(
    directory: Annotated[Path, typer.Argument(help="Where runs are.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List runs with their model, context, progress and losses."""
    from longfit.training.run_directory import list_runs

    found = list_runs(directory)
    if as_json:
        print_json(found)
        return
    if not found:
        print_lines(f"no runs below {directory}; start one: longfit train MODEL DATA")
        return
    rows = [
        (
            str(run.run_dir),
            Path(run.model).name,
            f"{run.context:,}" if run.context else "?",
            f"{run.step}/{run.total_steps}" + ("" if run.finished else " (unfinished)"),
            "" if run.loss is None else f"{run.loss:.4f}",
            "" if run.eval_loss is None else f"{run.eval_loss:.4f}",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed_at)),
        )
        for run in found
    ]
    print_table(("run", "model", "context", "steps", "loss", "validation", "changed"), rows)
