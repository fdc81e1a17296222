"""Where a run keeps layer inputs and frozen weights: the same losses wherever it is, and places that do not exist."""

import shutil
from pathlib import Path

import pytest
from tests.training.conftest import MakeConfig
from tests.training.tiny import read_losses

from longfit.errors import BackendError, ConfigError, ModelError
from longfit.exporting.merge import merge
from longfit.training.loop import train
from longfit.training.metrics import Event


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine__offload": "pinned"}, "offload .pinned.: pinned host memory is for accelerators; on a CPU use"),
        ({"engine__stream": "ram"}, "stream .ram.: on a CPU the weights are in host memory already; use file or none"),
        ({"engine__stream": "file", "engine__stream_folder": "/not/there"}, "/not/there: No such file or directory"),
    ],
)
def test_places_that_do_not_exist_are_refused(
    make_config: MakeConfig, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(make_config(**settings))
    assert not (tmp_path / "run").exists()


def test_fused_kernels_that_cannot_run_are_refused_where_they_are_insisted_on(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(BackendError, match=r"fused kernels 'liger': liger-kernel .*; use auto or none"):
        train(make_config(engine__fused="liger", model__device="cpu"))
    assert not (tmp_path / "run").exists()


def test_streamed_weights_train_to_the_same_losses(make_config: MakeConfig, tmp_path: Path) -> None:
    told: list[Event] = []
    streamed = {"engine__stream": "file", "engine__stream_folder": str(tmp_path), "data__validation_fraction": 0.2}
    plain = train(make_config(data__validation_fraction=0.2, output__run_dir=str(tmp_path / "plain")))
    result = train(make_config(**streamed), on_event=told.append)
    assert read_losses(result.run_dir) == read_losses(plain.run_dir)
    assert result.eval_loss == plain.eval_loss
    assert any(f"of frozen weights from {tmp_path}" in event.text for event in told)


def test_a_run_whose_adapters_begin_with_what_rounding_lost(make_config: MakeConfig, tmp_path: Path) -> None:
    """Its first loss is nearer to the dense model's; it resumes, and merges, as any run."""
    told: list[Event] = []
    small: dict[str, object] = {"train__steps": 2, "train__save_every": 1, "train__learning_rate": 0.01}
    dense = train(make_config(**small, output__run_dir=str(tmp_path / "dense")))
    plain = train(make_config(**small, model__quant="int4", output__run_dir=str(tmp_path / "plain")))
    begun = {**small, "model__quant": "int4", "adapter__start": "loftq", "adapter__rank": 24}
    result = train(make_config(**begun), on_event=told.append)
    first = {path: read_losses(path)[0] for path in (dense.run_dir, plain.run_dir, result.run_dir)}
    before, after = (abs(first[path] - first[dense.run_dir]) for path in (plain.run_dir, result.run_dir))
    assert after < before
    assert any("begin with what rounding lost (LoftQ)" in event.text for event in told)
    losses = read_losses(result.run_dir)
    shutil.rmtree(result.run_dir / "adapter")
    shutil.rmtree(sorted((result.run_dir / "checkpoints").iterdir())[-1])
    train(make_config(**begun), resume=result.run_dir)
    assert read_losses(result.run_dir) == losses
    merged = merge(result.run_dir, tmp_path / "merged", onto="4bit", tokens=64)
    assert merged.proof is not None  # what was written is base and adapter, within rounding


def test_a_start_that_does_not_fit_the_run_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing is rounded"):
        train(make_config(adapter__start="loftq"))
    with pytest.raises(ConfigError, match="start and init exclude each other"):
        make_config(adapter__start="loftq", adapter__init="x")
    with pytest.raises(ConfigError, match="not experts"):
        make_config(adapter__start="loftq", adapter__experts=True)
    assert not (tmp_path / "run").exists()
