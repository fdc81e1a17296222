"""``longfit runs``: the runs below a directory, newest first; ``longfit runs diff A B``: what differs between two."""

import time
from pathlib import Path
from typing import Annotated

import typer

from longfit.cli.output import print_json, print_lines, print_note, print_table
from longfit.errors import ConfigError
from longfit.words import format_bytes


def runs(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DIRECTORY] | diff RUN RUN", help="Where runs are [runs], or two to compare."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List runs with their model, context, progress and losses, or say what differs between two."""
    from longfit.training.run_list import list_runs

    words = words or ["runs"]
    if words[0] == "diff" and len(words) == 3:
        _print_diff(words[1], words[2], as_json=as_json)
        return
    if len(words) > 1 or (words == ["diff"] and not Path("diff").is_dir()):
        raise ConfigError(f"{' '.join(words)}: give one directory, or: longfit runs diff RUN RUN")
    directory = Path(words[0])
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
        if run.problem is None
    ]
    for run in found:
        if run.problem is not None:
            print_note(f"damaged: {run.problem}")
    print_table(("run", "model", "context", "steps", "loss", "validation", "changed"), rows)


def _print_diff(first: str, second: str, *, as_json: bool) -> None:
    from longfit.training.run_diff import diff_runs

    found = diff_runs(first, second)
    if as_json:
        print_json(found)
        return
    if found.settings:
        rows = [(each.name, _shown(each.first), _shown(each.second)) for each in found.settings]
        print_table(("setting", first, second), rows)
    else:
        print_lines("the settings are the same")
    data = {None: "one of them does not say what it read", True: "both read the same data", False: "the data differ"}
    print_lines("", data[found.same_data], "")
    rows = [(each.name, _shown(each.first, each.name), _shown(each.second, each.name)) for each in found.results]
    print_table(("result", first, second), rows)


def _shown(value: object, name: str = "") -> str:
    if value is None:
        return "-"
    if name.endswith("bytes"):
        return format_bytes(float(str(value)))
    if isinstance(value, float):
        return f"{value:,.1f}" if name == "tokens/s" else f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
