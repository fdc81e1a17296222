"""Writes the reference pages from the code: every setting, every verb, every public name.

python docs/generate.py            write docs/reference/{settings,commands,library}.md
python docs/generate.py --check    say which would change, and fail if one would (a test does the same)
"""

import argparse
import inspect
import re
import sys
import typing
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "reference"
NOTE = "<!-- Written by docs/generate.py from the code; edit the code. -->\n"


# ------------------------------------------------------------------------------------------------ settings
def settings_page() -> str:
    """Every dotted key with its default, what it allows and what it means."""
    from longfit.config.sections import SECTIONS

    lines = [
        NOTE,
        "# Settings",
        "",
        "Any of them can be given to `longfit train` as `section.key=value` or stand in a YAML file under its section.",
        "Later ones win: defaults, files, `section.key=value`, options. `longfit train ... --explain` shows each",
        "value and where it came from. Tokens may be written `16k` (= 16,384), bytes `24GiB`.",
    ]
    for name, section in SECTIONS.items():
        lines += ["", f"## {name}", "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        for key, field in section.model_fields.items():
            value = None if field.is_required() else field.get_default(call_default_factory=True)
            default = "required" if field.is_required() else "unset" if value is None else f"`{_yaml(value)}`"
            meaning = " ".join((field.description or "").split())
            cells = (f"`{name}.{key}`", default, _allowed(field.annotation), meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=200).strip().removesuffix("...").strip()


def _allowed(annotation: Any) -> str:
    """A type as people write it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _allowed(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{_yaml(value)}`" for value in arguments)
    if annotation is type(None):
        return "unset"
    if origin in (list, tuple, dict, set):
        return f"{origin.__name__} of {_allowed(arguments[0])}" if arguments else origin.__name__
    if arguments:  # a union
        return " or ".join(dict.fromkeys(_allowed(argument) for argument in arguments))
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


# ------------------------------------------------------------------------------------------------ commands
def commands_page() -> str:
    """Every verb with its arguments and options."""
    import typer

    from longfit.cli.app import app

    group: Any = typer.main.get_command(app)
    lines = [
        NOTE,
        "# Commands",
        "",
        "`longfit VERB --help` shows the same. Every verb takes `--debug` (the traceback of an error). Exit codes:",
        "0 done, 1 our fault, 2 the user can fix it, 130 stopped by Ctrl-C.",
    ]
    for name, command in group.commands.items():
        lines += ["", f"## longfit {name}", "", *inspect.cleandoc(command.help or "").splitlines(), ""]
        if getattr(command, "commands", None):
            lines += [f"- `longfit {name} {verb}`: {_first(sub.help)}" for verb, sub in command.commands.items()]
            continue
        lines += ["| argument or option | meaning |", "|---|---|"]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            shown = (
                f"`{parameter.metavar or parameter.name.upper()}`"
                if parameter.param_type_name == "argument"
                else ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
            )
            lines.append(f"| {shown} | {' '.join((getattr(parameter, 'help', '') or '').split())} |".replace("||", "|"))
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ library
def library_page() -> str:
    """Every public name with its signature and docstring."""
    import longfit

    lines = [
        NOTE,
        "# Library",
        "",
        "`import longfit` imports none of these before it is used. What is not on this page is not promised.",
    ]
    for name in longfit.__all__:
        value = getattr(longfit, name)
        if not callable(value):
            continue
        try:
            signature = str(inspect.signature(value))
        except (TypeError, ValueError):
            signature = "(...)"
        document = inspect.cleandoc(value.__doc__ or "")
        lines += ["", f"## longfit.{name}", "", "```python", f"{name}{_plain(signature)}", "```", "", "```text"]
        lines += [*document.splitlines(), "```"]
    return "\n".join(lines) + "\n"


def _plain(signature: str) -> str:
    """A signature without the modules of its types, one argument a line where it is long."""
    for module in ("torch.nn.modules.module.", "collections.abc.", "typing.", "torch.", "pathlib."):
        signature = signature.replace(module, "")
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)
    if len(signature) < 100 or "{" in signature:
        return signature
    inside, _, result = signature[1:].rpartition(")")
    return "(\n" + "".join(f"    {part},\n" for part in _split(inside)) + ")" + result


def _split(arguments: str) -> list[str]:
    """The arguments of a signature, cut at commas outside of brackets."""
    parts, depth, begin = [], 0, 0
    for index, character in enumerate(arguments):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append(arguments[begin:index].strip())
            begin = index + 1
    return [part for part in (*parts, arguments[begin:].strip()) if part]


def _first(text: str | None) -> str:
    return inspect.cleandoc(text or "").partition("\n")[0]


PAGES = {"settings.md": settings_page, "commands.md": commands_page, "library.md": library_page}


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    stale = []
    for name, make in PAGES.items():
        path, text = FOLDER / name, make()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not arguments.check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    print(f"changed: {', '.join(stale)}" if stale else "all pages are up to date")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
