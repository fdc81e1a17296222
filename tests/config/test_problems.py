"""How mistakes in settings are told: all at once, each with its place and its fix."""

from pathlib import Path

import pytest
from tests.config.test_run import NEEDED

from longfit.config import load_config
from longfit.errors import ConfigError


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("engine.arena=file", "engine.offload=file"),
        ("engine.arena_folder=/disk", "engine.offload_folder=/disk"),
        ("engine.keep_attention=0", "engine.saved_attention=0"),
    ],
)
def test_a_renamed_setting_is_refused_with_its_new_name(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"is called {new.partition('=')[0]} now; write {new}"):
        load_config(overrides=[old], flags=NEEDED)


def test_all_mistakes_are_told_at_once_each_with_its_place_and_its_fix(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {name: base, quant: nf5}\n"
        "context:\n  context: 32q\n"
        "train:\n  learning_rte: 2e-4\n  steps: 1\n  epochs: 2\n  lora_r: 8\n"
        "lora_alpha: 3\n"
        "data: texts\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides=["context.rope=yran"], flags={"--group-size": ("context.group_size", "4097")})
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0] == "10 settings are wrong:"
    expected = [
        f"{file}:1: model.quant = 'nf5': must be 'nf4', 'fp4', 'int4', 'int8' or 'none'; try quant: nf4",
        f"{file}:3: context.context = '32q': must be a number of tokens such as 8192 or 16k (= 16,384)",
        f"{file}:5: unknown key train.learning_rte; did you mean train.learning_rate?",
        f"{file}:8: unknown key train.lora_r; did you mean adapter.rank?",
        f"{file}:9: unknown key lora_alpha; did you mean adapter.alpha?",
        "--group-size 4097: must be an even number of tokens, at least 2; try --group-size 4098",
        "override: context.rope = 'yran': must be 'yarn', 'linear', 'ntk', 'theta' or 'none'; try context.rope=yarn",
        f"train ({file}:6, {file}:7): steps and epochs exclude each other; drop one",
        "no data given: longfit train MODEL DATA",
    ]
    assert set(expected) <= set(lines)
    assert any(line.startswith(f"{file}:10: data = 'texts': a section holds") for line in lines)


def test_a_wrong_value_is_told_although_a_later_one_replaces_it() -> None:
    with pytest.raises(ConfigError, match=r"override: train.steps = 'two'") as caught:
        load_config(
            overrides=["train.steps=two", "train.seed=1", "train.seed=2"],
            flags=NEEDED | {"--steps": ("train.steps", "2")},
        )
    assert str(caught.value).startswith("1 setting is wrong")
