"""A new run from an old adapter: its first loss is the old one's, whatever rank and layers; nothing is lost unsaid."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.training.conftest import MakeConfig
from tests.training.tiny import read_losses

from longfit.errors import ConfigError, ModelError
from longfit.files import checksums
from longfit.model.weight_files import ADAPTER
from longfit.training.best import read_best
from longfit.training.loop import train

U = 2.0**-24  # of float32


@pytest.fixture
def old(make_config: MakeConfig, tmp_path: Path) -> Path:
    config = make_config(
        output__run_dir=str(tmp_path / "old"), train__learning_rate=0.02, adapter__train_norms=True,
        adapter__targets=["q_proj", "v_proj"],
    )  # fmt: skip
    return train(config).run_dir


def first_loss(make_config: MakeConfig, tmp_path: Path, name: str, **settings: object) -> float:
    """Of a run whose first window is the same in all of them."""
    defaults = {"train__steps": 1, "adapter__targets": ["q_proj", "v_proj"], "adapter__train_norms": True}
    config = make_config(output__run_dir=str(tmp_path / name), **{**defaults, **settings})
    return read_losses(train(config).run_dir)[0]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"adapter__rank": 7},
        {"adapter__alpha": 5.0},
        {"adapter__targets": "all-linear", "adapter__rank": 6, "adapter__train_embeddings": True},
    ],
    ids=["the same", "a higher rank", "another alpha", "more layers"],
)
def test_the_first_loss_is_the_old_models(
    shape: dict[str, object], old: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Up to rounding: B is multiplied by a ratio of scalings, and sums have more terms, which are zero."""
    anew = first_loss(make_config, tmp_path, "anew")
    expected = first_loss(make_config, tmp_path, "expected", adapter__init=str(old))
    found = first_loss(make_config, tmp_path, "found", adapter__init=str(old), **shape)
    assert abs(found - expected) <= 64 * 20 * U * expected
    assert abs(anew - expected) > 1e-3


def test_the_first_loss_is_the_old_runs_evaluation(make_config: MakeConfig, tmp_path: Path) -> None:
    """What the old run measured on a text is what the new one begins with when that text is its data."""
    held = tmp_path / "held.txt"
    held.write_text("past the hills and over the river the road went on. ")
    settings = {"data__validation": str(held), "train__eval_every": 4, "train__learning_rate": 0.02}
    run = train(make_config(output__run_dir=str(tmp_path / "old"), **settings)).run_dir
    evaluated = read_best(run)
    assert evaluated is not None
    new = make_config(
        output__run_dir=str(tmp_path / "new"), data__path=str(held), adapter__init=str(run), train__steps=1
    )
    (found,) = read_losses(train(new).run_dir)
    assert abs(found - evaluated.eval_loss) <= 64 * 20 * U * found


def test_an_adapter_folder_is_as_good_as_a_run(old: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    losses = [
        first_loss(make_config, tmp_path, name, adapter__init=str(init))
        for name, init in {"run": old, "folder": old / "adapter"}.items()
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("trained", ["lora_A", "lora_B", "norm"])
@pytest.mark.parametrize(("damaged", "said"), [(math.nan, "holds NaN or infinity"), (7, "holds I64")])
def test_an_adapter_that_holds_no_numbers_to_train_on_is_named(
    old: Path, make_config: MakeConfig, trained: str, damaged: float, said: str
) -> None:
    folder = old / "adapter"
    tensors = load_file(folder / ADAPTER)
    name = next(name for name in tensors if trained in name)
    tensors[name] = torch.full_like(tensors[name], damaged) if damaged != 7 else tensors[name].long()
    save_file(tensors, folder / ADAPTER)
    (folder / checksums.NAME).unlink()
    with pytest.raises(ModelError, match=f"{folder / ADAPTER}: {name} {said}"):
        train(make_config(adapter__init=str(folder), adapter__train_norms=True, adapter__targets=["q_proj", "v_proj"]))


def test_what_would_be_lost_is_refused(old: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    for message, settings in {
        r"its rank is 4, here it is 2; use adapter.rank=4 or more": {"adapter__rank": 2},
        r"2 of its layers get no adapter here, first .*v_proj": {"adapter__targets": ["q_proj"]},
        r"tensors trained whole, first .*norm.*; add adapter.train_norms=true": {"adapter__train_norms": False},
    }.items():
        with pytest.raises(ConfigError, match=message):
            first_loss(make_config, tmp_path, "new", adapter__init=str(old), **settings)
    with pytest.raises(ConfigError, match="neither a run nor an adapter folder"):
        first_loss(make_config, tmp_path, "new", adapter__init=str(tmp_path))
    assert not (tmp_path / "new").exists()


def test_resuming_a_warm_started_run_needs_the_old_one_no_more(
    old: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        output__run_dir=str(tmp_path / "new"), adapter__init=str(old), adapter__targets=["q_proj", "v_proj"],
        adapter__train_norms=True, train__steps=3, train__save_every=1,
    )  # fmt: skip
    whole = read_losses(train(config).run_dir)
    shutil.rmtree(tmp_path / "new" / "adapter")
    shutil.rmtree(tmp_path / "new" / "checkpoints" / "step-000003")
    shutil.rmtree(old)
    assert read_losses(train(config, resume=True).run_dir) == whole


def test_a_warm_started_run_killed_before_its_first_checkpoint_is_warm_started_again(
    old: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        output__run_dir=str(tmp_path / "new"), adapter__init=str(old), adapter__train_norms=True, train__steps=2
    )
    run_dir = train(config).run_dir
    whole = read_losses(run_dir)
    for folder in ("adapter", "checkpoints"):
        shutil.rmtree(run_dir / folder)
    assert read_losses(train(config, resume=True).run_dir) == whole
