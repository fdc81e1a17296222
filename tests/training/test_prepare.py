"""Where a run keeps layer inputs and frozen weights: the same losses wherever it is, and places that do not exist."""

from pathlib import Path

import pytest
from tests.training.conftest import MakeConfig
from tests.training.tiny import read_losses

from longfit.errors import BackendError, ConfigError
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
