"""The command line says what it can do: every setting and option that a message advises is one that exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from tests.cli.messages import messages, reachable, texts_of

from longfit.cli.app import app, main
from longfit.config import describe, load_config
from longfit.config.sections import SECTIONS, known_keys

VALUE = r"'?\{[^}]*\}'?|\[[^\]]*\]|\w[\w-]*(?::\w+)?(?:\.\w+)*"
SETTING = re.compile(rf"\b({'|'.join(SECTIONS)})\.([a-z]\w*)(?:=({VALUE}))?")
NEEDS = {
    "model.int8_threshold": ["model.quant=int8"],
    "context.group_size": ["context.attention=shifted"],
    "optim.file": ["optim.budget=1GiB"],
}  # to act at all
PLACEHOLDERS = re.compile(r"[A-Z]{2}|^$|\.\.\.|N$|\{\}")  # values that stand for the user's own: COLUMN, cuda:N


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


GROUP: Any = typer.main.get_command(app)
EVERYWHERE = {"--help", "--debug"}
SECTIONS_OF = {
    **dict.fromkeys(("train", "plan", "data", "demo"), tuple(SECTIONS)),
    **dict.fromkeys(("eval", "chat"), ("model", "data")),
    **dict.fromkeys(("merge", "export"), ("data", "model.device")),
}


def takes(verb: str, key: str) -> bool:
    return any(key == given or key.startswith(f"{given}.") for given in SECTIONS_OF.get(verb, ()))


COMMAND = re.compile(rf"longfit ({'|'.join(GROUP.commands)})\b")
OTHERS = re.compile(r"(?:libreoffice|inkscape|pip|torchrun|llama-cli) [^,;]*")  # commands of other programs
TOLD = {
    "the validation loss has not fallen {} since step {} ({}): train.patience",  # why a run ended, in its report
    "As data.train_on, train_on or data. Default: all.",  # the help of explain
}


def options_of(verb: str) -> set[str]:
    return EVERYWHERE | {
        option for item in GROUP.commands[verb].params for option in (*item.opts, *item.secondary_opts)
    }


def unfit(text: str, verb: str) -> list[str]:
    """What a text names that a verb does not take; behind ``longfit VERB`` it is that verb that must take it."""
    found = []
    for sentence in re.split(r"[,;\n`]", OTHERS.sub("", text)):
        named = COMMAND.search(sentence)
        other, rest = (named[1], sentence[named.end() :]) if named else (verb, "")
        for part, taker in ((sentence[: named.start()] if named else sentence, verb), (rest, other)):
            found += [
                option for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", part) if option not in options_of(taker)
            ]
            keys = [f"{section}.{key}" for section, key, _ in SETTING.findall(part)]
            found += [key for key in keys if key in known_keys() and not takes(taker, key)]
    return found


@pytest.mark.parametrize("verb", sorted(GROUP.commands))
def test_every_verb_takes_what_the_messages_that_it_can_reach_advise(verb: str) -> None:
    callback = GROUP.commands[verb].callback
    reached = reachable(callback.__module__, callback.__name__)
    texts = [(place, text) for symbol in reached for place, text in texts_of(symbol)]
    assert len(texts) > 20  # the walk has come somewhere
    for place, text in texts:
        if " " in text and "var(--" not in text and text not in TOLD:  # a sentence, and no style sheet
            bad = unfit(text, verb)
            if place.startswith("config."):  # they tell of keys that were given, and stand where those were given
                bad = [name for name in bad if name.startswith("--")]
            assert not bad, f"{place}: longfit {verb} does not take {bad}: {text}"


def test_the_walk_reaches_what_verbs_share_and_sees_what_is_wrong() -> None:
    chat = reachable("longfit.cli.chat", "chat")
    assert ("longfit.data.readers", "decode_text") in chat
    assert ("longfit.training.warm_start", "warm_start") not in chat
    assert unfit("x; add train.steps=3, or --rank 4", "chat") == ["train.steps", "--rank"]
    assert unfit("x: longfit train M D --rank 4 train.steps=3", "chat") == []
    assert unfit("x: longfit chat M --rank 4", "train") == ["--rank"]


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
