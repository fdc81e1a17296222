"""A tiny base model and some texts, made once, and a short way to a config about them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.training.tiny import save_tiny_model, write_texts

from longfit.config import RunConfig

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and ``texts``."""
    folder = tmp_path_factory.mktemp("workplace")
    save_tiny_model(folder / "model")
    write_texts(folder / "texts")
    return folder


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
