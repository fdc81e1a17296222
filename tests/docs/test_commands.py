"""Every command in README, docs and recipes is one that the command line takes: its verb, its options, its settings."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from longfit.cli.app import app
from longfit.config.sections import known_keys

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]
GROUP: Any = typer.main.get_command(app)


def commands(page: Path) -> list[str]:
    """The commands of a page: lines of its code blocks and its inline code that begin with ``longfit VERB``."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = [text] if page.suffix == ".yaml" else re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    line = re.compile(r"^[#$ ]*(?:\.venv/bin/)?(longfit [a-z]+[^\n`]*)$", flags=re.M)
    lines = [found for block in blocks for found in line.findall(block)]
    return [*lines, *re.findall(r"`(longfit [a-z]+[^`\n]*)`", text)]


CASES = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), CASES, ids=[f"{p.name}: {c[:70]}" for p, c in CASES])
def test_the_command_line_takes_it(page: Path, command: str) -> None:
    command = re.split(r"\s{2,}#|\s#\s|\s[|>]\s", command)[0]  # a remark behind it, or where its output goes
    words = [word for word in shlex.split(command)[1:] if word not in ("...", "[...]", "--debug")]
    words = [word.strip("[]") for word in words]
    if words[0] not in GROUP.commands:
        assert words[0] in ("VERB", "verb"), f"{page}: no verb {words[0]}"
        return
    verb = GROUP.commands[words[0]]
    flags = {"--help", "-h"}
    flags |= {flag for parameter in verb.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for sub in getattr(verb, "commands", {}).values():
        flags |= {flag for parameter in sub.params for flag in parameter.opts}
    for word in words[1:]:
        if word.startswith("-"):
            assert word.partition("=")[0] in flags, f"{page}: longfit {words[0]} has no option {word}"
        elif re.match(r"[a-z]+\.[a-z_]+=", word):
            assert word.partition("=")[0] in known_keys(), f"{page}: no setting {word}"


def test_there_are_commands_to_test() -> None:
    assert len(CASES) > 20
