"""``longfit explain [KEY]...``: what a setting is for, what it may be, and what it is unless given."""

from typing import Annotated

import typer

from longfit.cli.output import print_json, print_lines, print_table


def explain(
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY]...", help="As data.train_on, train_on or data. Default: all.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """Explain settings: every ``section.key=value`` of train, data, eval and chat, and every key of a run.yaml."""
    from longfit.config import describe

    found = describe(keys or [])
    if as_json:
        print_json(found)
        return
    if len(found) > 1:
        rows = [(setting.key, setting.default, setting.allowed, setting.meaning) for setting in found]
        print_table(("setting", "default", "allowed", "meaning"), rows)
        return
    setting = found[0]
    print_lines(setting.key, f"  {setting.meaning}", f"  default: {setting.default}", f"  allowed: {setting.allowed}")
    print_lines(f"  longfit train MODEL DATA {setting.key}={setting.example}")
