"""A finished run on a tiny model that reads bytes: native context 64, trained at 512 tokens in two steps."""

from pathlib import Path

import torch
from tests.model_folders import save_model

from longfit.config import RunConfig
from longfit.training.loop import train

CONTEXT, NATIVE = 512, 64


def prose(num_chars: int, *, start: int = 0) -> str:
    """Text that neither repeats nor says anything."""
    words = "the long road went over hills and rivers to a town where nobody slept".split()  # noqa: SIM905
    text = " ".join(words[(start + index * index) % len(words)] for index in range(num_chars // 3))
    return text[:num_chars]


def make_run(folder: Path) -> Path:
    """Write ``model``, ``texts``, ``held-out.txt`` and the finished ``run`` into a folder; returns the run."""
    save_model(folder / "model", dtype=torch.float32)
    (folder / "texts").mkdir()
    (folder / "texts" / "book.txt").write_text(prose(1023))
    (folder / "held-out.txt").write_text(prose(1100, start=5))
    settings = {
        "model.name": str(folder / "model"),
        "model.quant": "none",
        "model.dtype": "float32",
        "model.device": "cpu",
        "data.path": str(folder / "texts"),
        "data.validation": str(folder / "held-out.txt"),
        "context.context": CONTEXT,
        "context.attention": "shifted",
        "context.group_size": 128,
        "adapter.rank": 2,
        "train.steps": 2,
        "train.learning_rate": 0.01,
        "train.schedule": "constant",
        "train.warmup_steps": 0,
        "output.run_dir": str(folder / "run"),
    }
    assert train(RunConfig.of(settings)).finished
    return folder / "run"
