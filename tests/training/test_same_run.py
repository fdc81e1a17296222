"""A run that goes on is the same run, or it is refused, with what changed."""

import shutil
from pathlib import Path

import pytest
from tests.training.conftest import MakeConfig
from tests.training.tiny import interrupt_at, write_texts

from longfit.config import RunConfig
from longfit.errors import RunError
from longfit.training.loop import train
from longfit.training.same_run import merge_for_resume


def test_resuming_refuses_changed_settings_and_names_them(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config(), on_event=interrupt_at(1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunError) as caught:
        train(make_config(train__learning_rate=1e-3, adapter__rank=8), resume=True)
    assert "adapter.rank: the run has 4, now 8" in str(caught.value)
    assert "train.learning_rate: the run has 0.0002, now 0.001" in str(caught.value)
    assert "train.steps" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_resuming_refuses_changed_data_and_names_it(make_config: MakeConfig, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    train(make_config(data__path=str(texts)), on_event=interrupt_at(1))
    (texts / "text1.txt").write_text("another text")
    (texts / "new.txt").write_text("a new text")
    (texts / "text2.txt").unlink()
    with pytest.raises(RunError, match=r"(?s)data changed.*new.txt: new.*text1.txt: changed.*text2.txt: missing"):
        train(make_config(data__path=str(texts)), resume=True)


def test_another_base_model_is_named(run: RunConfig, run_dir: Path, workplace: Path, tmp_path: Path) -> None:
    shutil.copytree(workplace / "model", tmp_path / "model")
    config = run.replace({"model.name": str(tmp_path / "model"), "output.run_dir": str(tmp_path / "own")})
    result = train(config)
    weights = tmp_path / "model" / "model.safetensors"
    *before, last = weights.read_bytes()
    weights.write_bytes(bytes([*before, last ^ 1]))
    with pytest.raises(RunError, match=r"the base model changed \(model\.safetensors\)"):
        train(config, resume=True)
    assert result.finished


def test_what_does_not_change_the_losses_may_change_and_what_rounds_is_warned_of() -> None:
    stored = RunConfig.of({"model.name": "m", "data.path": "d", "train.save_every": 5})
    asked = RunConfig.of({"model.name": "m", "data.path": "d", "train.save_every": 9, "engine.tile": 64})
    config, warnings = merge_for_resume(stored, asked)
    assert (config.train.save_every, config.engine.tile) == (9, 64)
    assert [text.partition(":")[0] for text in warnings] == ["engine.tile changed from None to 64"]
