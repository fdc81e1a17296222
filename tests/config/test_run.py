"""A run's settings: where they come from, how mistakes are told, what is remembered."""

from pathlib import Path

import pytest

from longfit.config import RunConfig, load_config
from longfit.errors import ConfigError

NEEDED = {"MODEL": ("model.name", "base"), "DATA": ("data.path", "texts")}


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
            "stream_folder only acts with stream file; add engine.stream=file",
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
