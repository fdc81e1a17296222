"""A short way to a config about a tiny base model and some texts, and a run that was broken off."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.training.tiny import interrupt_at

from longfit.config import RunConfig
from longfit.training.loop import train

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_config(workplace: Path, tmp_path: Path) -> MakeConfig:
    """Settings of a short run on the tiny model; ``section__key=value`` changes them."""

    def make(**settings: object) -> RunConfig:
        defaults = {
            "model.name": str(workplace / "model"),
            "model.quant": "none",
            "model.dtype": "float32",
            "data.path": str(workplace / "texts"),
            "context.context": 96,
            "adapter.rank": 4,
            "train.steps": 4,
            "output.run_dir": str(tmp_path / "run"),
        }
        return RunConfig.of(defaults | {key.replace("__", "."): value for key, value in settings.items()})

    return make


@pytest.fixture
def run(make_config: MakeConfig, tmp_path: Path) -> RunConfig:
    """A run of four steps that was stopped after the third, with the checkpoints of steps 2 and 3."""
    config = make_config(train__save_every=1)

    assert not train(config, on_event=interrupt_at(3)).finished
    return config


@pytest.fixture
def run_dir(run: RunConfig) -> Path:
    return Path(str(run.output.run_dir))
