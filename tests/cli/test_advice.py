"""The command line says what it can do: every setting and option that a message advises is one that exists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import longfit
from longfit.cli.app import app, main
from longfit.config import describe, load_config
from longfit.config.sections import SECTIONS, known_keys

PACKAGE = Path(longfit.__file__).parent
VALUE = r"'?\{[^}]*\}'?|\[[^\]]*\]|\w[\w-]*(?::\w+)?(?:\.\w+)*"
SETTING = re.compile(rf"\b({'|'.join(SECTIONS)})\.([a-z]\w*)(?:=({VALUE}))?")
NEEDS = {
    "model.int8_threshold": ["model.quant=int8"],
    "context.group_size": ["context.attention=shifted"],
    "optim.file": ["optim.budget=1GiB"],
}  # to act at all
PLACEHOLDERS = re.compile(r"[A-Z]{2}|^$|\.\.\.|N$|\{\}")  # values that stand for the user's own: COLUMN, cuda:N


def messages(root: Path = PACKAGE) -> Iterator[tuple[str, str]]:
    """Every text in the sources that is no docstring, with its place."""
    for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):  # what is filled in stands for itself: data.{name}
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                yield f"{path.name}:{node.lineno}", "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield f"{path.name}:{node.lineno}", node.value


def test_every_setting_that_a_message_advises_exists_and_takes_the_value() -> None:
    found = 0
    for place, text in messages():
        for section, key, value in SETTING.findall(text):
            if " " not in text or f"{section}.{key}" in ("data.json", "config.json", "model.safetensors"):
                continue  # no sentence: the name of a file or module
            if f"{section}.{key}" not in known_keys():
                assert not value, f"{place}: {section}.{key} is no setting"
                continue
            found += 1
            if value and not PLACEHOLDERS.search(value):
                load_config(
                    overrides=[f"{section}.{key}={value.strip(chr(39))}"],
                    flags={"MODEL": ("model.name", "m"), "DATA": ("data.path", "d")},
                )
    assert found > 30


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def test_every_option_that_a_message_advises_exists() -> None:
    group = typer.main.get_command(app)
    known = {option for command in (group, *group.commands.values()) for option in options_of(command)}  # type: ignore[attr-defined]
    known |= {
        "--help",
        "--lora",
        "--nproc-per-node",
        "--debug",
        "--no-deps",
        "--headless",
        "--export-type",
        "--convert-to",
        "--arena",
    }  # and those of other programs
    for place, text in messages():
        if " " in text and "var(--" not in text:  # a style sheet's variables look like options
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
                assert option in known or option.startswith("--{"), f"{place}: {option} is no option"


@pytest.mark.parametrize("verb", ["train", "data", "eval", "chat"])
def test_every_verb_that_reads_data_takes_its_settings(
    verb: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"train": ["DATA"], "data": [], "eval": ["ppl"], "chat": []}[verb]
    model = ["--model", str(workplace / "model")] if verb == "data" else []
    target = str(workplace / "texts") if verb == "data" else str(workplace / "model")
    assert main([verb, target, *words, "data.bad_row=skip", *model]) == 2
    assert "unknown key data.bad_row; did you mean data.bad_rows?" in capsys.readouterr().err
    assert main([verb, target, *words, "data.bad_rows=never", *model]) == 2
    assert "must be 'stop' or 'skip'" in capsys.readouterr().err


def test_what_every_verb_reaches_advises_what_every_verb_takes() -> None:
    """Data and models are read by train, data, eval, chat, merge and export, which share these two sections only."""
    for room in ("data", "model"):
        for place, text in messages(PACKAGE / room):
            for section, key, value in SETTING.findall(text):
                if " " in text and value and f"{section}.{key}" in known_keys() and "longfit train" not in text:
                    assert section in ("data", "model"), f"{place}: {section}.{key} is for train alone"


@pytest.mark.parametrize("verb", ["train", "plan", "data", "eval", "chat", "merge", "export", "demo"])
def test_every_verb_that_loads_something_takes_settings_and_a_dtype(
    verb: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, texts = str(workplace / "model"), str(workplace / "texts")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"model:\n  name: {model}\ndata:\n  path: {texts}\n")
    words = {
        "train": [model, texts],
        "plan": [model, "--context", "64"],
        "data": [texts, "--model", model],
        "eval": [model, "ppl", "--data", texts],
        "chat": [model],
        "merge": [str(run), "--out", str(tmp_path / "out")],
        "export": [str(run), "--out", str(tmp_path / "out"), "--format", "safetensors"],
        "demo": ["--run-dir", str(tmp_path / "demo")],
    }[verb]
    assert main([verb, *words, "data.bad_row=skip"]) == 2
    assert "unknown key data.bad_row; did you mean data.bad_rows?" in capsys.readouterr().err
    assert main([verb, *words, "--dtype", "float17"]) == 2
    assert "float17" in capsys.readouterr().err


def test_measuring_takes_no_setting_that_it_does_not_read(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(workplace / "model"), "ppl", "train.steps=3"]) == 2
    assert "train.steps: only training reads it" in capsys.readouterr().err


def test_settings_are_explained_by_key_name_or_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(describe()) == len(known_keys())
    assert {setting.key for setting in describe(["optim"])} >= {"optim.optim", "optim.budget"}
    for setting in describe():
        assert setting.meaning, setting.key
        if not PLACEHOLDERS.search(setting.example):
            overrides = [f"{setting.key}={setting.example.strip(chr(39))}"]
            config = load_config(
                overrides=[*NEEDS.get(setting.key, []), *overrides],
                flags={"MODEL": ("model.name", "m"), "DATA": ("data.path", "d")},
            )
            assert config.origin(setting.key) == "override"
    assert main(["explain", "data.train_on"]) == 0
    assert "allowed: all, last, marked" in capsys.readouterr().out
    assert main(["explain", "train_onn"]) == 2
    assert "did you mean data.train_on?" in capsys.readouterr().err
