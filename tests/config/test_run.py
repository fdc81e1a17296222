"""A run's settings: where they come from, how mistakes are told, what is remembered."""

from pathlib import Path

import pytest

from longfit.config import RunConfig, load_config
from longfit.config.sections import known_keys, meaning, parse_bytes, parse_tokens
from longfit.errors import ConfigError

NEEDED = {"MODEL": ("model.name", "base"), "DATA": ("data.path", "texts")}


@pytest.mark.parametrize(
    ("text", "tokens"), [("32k", 32_768), ("100_000", 100_000), ("1m", 1_048_576), ("1.5k", 1536), (8192, 8192)]
)
def test_tokens_parse(text: object, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("512MiB", 2**29), ("7", 7)]
)
def test_bytes_parse(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


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


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["context.group_size=64"], "group_size only acts with shifted attention"),
        (
            ["context.attention=shifted", "context.group_size=64", "context.context=32"],
            "longer than the context 32; drop it",
        ),
        (["train.steps=5", "train.warmup_steps=5"], "must be smaller than steps"),
        (["optim.file=state"], "file only acts with a budget"),
        (["engine.engine=plain", "engine.tile=64"], "tile, offload and saved_* only act with engine sweep"),
        (["engine.offload_folder=/tmp"], "offload_folder only acts with offload file"),
        (
            ["engine.stream_folder=/tmp", "engine.stream=ram"],
            "stream_folder only acts with stream file; add --stream file",
        ),
        (["engine.engine=plain", "engine.stream=file"], "stream only acts with engine sweep"),
        (["data.validation=x", "data.validation_fraction=0.1"], "exclude each other"),
        (["model.block_size=96"], "must be a power of two; try model.block_size=64"),
        (["train.learning_rate=nan"], "must be"),
        (["train.batch_size=0"], "must be at least 1"),
        (["context.context=true"], "must be a number of tokens"),
        (["zzz.qqq=1"], "the sections are model, context"),
        (["train"], "section.key=value"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides, flags=NEEDED)
    assert told in str(caught.value)


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


def test_resolved_settings_survive_yaml(tmp_path: Path) -> None:
    config = RunConfig.of(
        {"model.name": "base", "data.path": "texts", "context.attention": "shifted", "train.epochs": 2}
    )
    config = config.resolve(native_context=8_200).resolve_steps(num_windows=103, num_processes=2)
    assert config.context.context == 8_200
    assert (config.train.steps, config.train.epochs, config.train.warmup_steps) == (103, None, 10)
    assert config.resolve(native_context=1).resolve_steps(num_windows=1) == config  # nothing is resolved twice
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file).flat() == config.flat()
    assert {row.key for row in config.explain() if row.origin.startswith("auto")} == {
        "context.context",
        "train.steps",
        "train.epochs",
        "train.warmup_steps",
    }


def test_every_setting_says_what_it_does() -> None:
    assert [key for key in known_keys() if not meaning(key).strip().endswith(".")] == []


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


def test_a_wrong_value_is_told_although_a_later_one_replaces_it() -> None:
    with pytest.raises(ConfigError, match=r"override: train.steps = 'two'") as caught:
        load_config(
            overrides=["train.steps=two", "train.seed=1", "train.seed=2"],
            flags=NEEDED | {"--steps": ("train.steps", "2")},
        )
    assert str(caught.value).startswith("1 setting is wrong")


def test_the_largest_amounts_are_those_of_a_machine() -> None:
    for text in ("9" * 400 + "GiB", "2000000TiB"):
        with pytest.raises(ConfigError, match="no more than any machine has"):
            load_config(overrides=[f"optim.budget={text}"], flags=NEEDED)
