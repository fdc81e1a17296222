"""``longfit demo``: the main job on a real small model and real text, on this machine, offline."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from longfit.cli.output import print_json, print_lines, print_table, show_progress
from longfit.cli.values import read_tokens


def demo(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="As in train.", show_default=False)
    ] = None,
    *,
    run_dir: Annotated[Path, typer.Option(help="Directory of the run; must be new.")] = Path("runs/demo"),
    context: Annotated[str | None, typer.Option(help="Tokens to extend to; default: what fits the time.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default: what fits the time.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: what is fast here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Quantise, extend, train and evaluate SmolLM2-135M, and show what changed."""
    from longfit.config import load_config

    flags: dict[str, tuple[str, object]] = {"MODEL": ("model.name", "(demo)"), "DATA": ("data.path", "(demo)")}
    if dtype is not None:
        flags["--dtype"] = ("model.dtype", dtype)
    config = load_config(overrides=words or [], flags=flags)
    flat, own = config.flat(), {"MODEL", "DATA"}
    settings = {key: flat[key] for key in config.given() if config.origin(key) not in own}

    from longfit.demo import run_demo

    chosen = {"context": None if context is None else read_tokens("--context", context), "steps": steps}
    with show_progress(quiet=as_json) as on_event:
        result = run_demo(
            run_dir=run_dir,
            settings=settings,
            on_event=on_event,
            **{name: value for name, value in chosen.items() if value is not None},
        )
    if as_json:
        print_json(result)
        return
    from longfit.evaluation.demo_report import summary_lines, table

    values = asdict(result)
    header, *rows = table(values)
    print_lines("", "Perplexity by position on held-out text, exact attention:", "")
    print_table(header, rows)
    print_lines("", *summary_lines(values), f"Report: {result.run_dir / 'report.html'}", "", "Next:")
    print_lines(*(f"  {command}" for command in result.next_commands))
