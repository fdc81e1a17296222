"""A short way to a config about a tiny base model and some texts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from longfit.config import RunConfig

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
