"""Where settings come from: files with their lines, overrides, flags."""

from pathlib import Path

import pytest
from tests.config.test_run import NEEDED

from longfit.config import load_config
from longfit.errors import ConfigError


def test_later_sources_win_and_are_remembered(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  learning_rate: 2e-4\n  seed: 1\n  steps: 9\ncontext: {context: 16k}\n")
    flags = {**NEEDED, "--steps": ("train.steps", "11")}
    config = load_config(
        file, overrides=["train.seed=2", "train.steps=10", "adapter.targets=[q_proj, v_proj]"], flags=flags
    )
    assert config.train.learning_rate == 2e-4  # YAML 1.1 reads 2e-4 as text
    assert (config.train.seed, config.train.steps, config.context.context) == (2, 11, 16_384)
    assert config.adapter.targets == ["q_proj", "v_proj"]
    origins = {row.key: row.origin for row in config.explain()}
    assert origins["train.learning_rate"] == f"{file}:2"
    assert origins["context.context"] == f"{file}:5"
    assert (origins["train.seed"], origins["train.steps"]) == ("override", "--steps")
    assert (origins["model.name"], origins["train.batch_size"]) == ("MODEL", "default")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"train:\n  steps: 1\n  steps: 2\n", ":3: steps was already given in line 2"),
        (b"train: [1\n", "not valid YAML"),
        (b"\xff\xfe\x00", "is not text: byte 0"),
        (b"- 1\n", "a config holds sections"),
        (b"a: *b\n", ":1: *b repeats a value"),
    ],
)
def test_a_damaged_file_is_told_with_its_line(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file, flags=NEEDED)
    assert str(file) in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[" * 100_000, ":1: nested more than 8 deep"),
        (b"train: " + b"{a: " * 5000, ":1: nested more than 8 deep"),
        (b"train:\n  steps: &a 3\n  seed: *a\n", ":3: *a repeats a value"),
        (b"train:\n  steps: 2024-13-45\n", ":2: '2024-13-45' cannot be read"),
        (b"train:\n  steps: 0x_\n", ":2: '0x_' cannot be read"),
        (b"train:\n  steps: " + b"9" * 5000 + b"\n", ":2: '9999"),
        (b"train:\n  steps: !!python/object/apply:os.getcwd []\n", ":2: "),
        (b"train:\n  steps: 1000000000000\n", "at most 1000000000"),
        (b"train:\n  seed: " + b"9" * 40 + b"\n", "seed"),
        (b"context:\n  context: " + b"9" * 400 + b"k\n", "context"),
        (b"optim:\n  betas: [0.9]\n", "betas"),
        (b"? [a, b]\n: c\n", ":1"),
        (b"x" * (2 << 20), "allowed are 1,048,576"),
    ],
)
def test_odd_yaml_is_told_with_its_line(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    "text", ["adapter.targets=[" + "[" * 5000, "adapter.targets=[0x_]", "adapter.targets=[&a 1, *a]"]
)
def test_an_odd_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets"):
        load_config(overrides=[text])
