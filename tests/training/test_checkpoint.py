"""A checkpoint is whole or not there; a full disk and a kill leave the one before."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import tiny_model
from tests.training.conftest import MakeConfig

import longfit
from longfit.errors import RunError
from longfit.model.adapters import add_adapters
from longfit.training.checkpoint import (
    RunState,
    list_checkpoints,
    load_checkpoint,
    read_state,
    save_checkpoint,
    trained_tensors,
)
from longfit.training.loop import train
from longfit.training.metrics import MetricsFile, read_metrics

CPU = torch.device("cpu")


class NoTokenizer:
    def save_pretrained(self, folder: str) -> None:
        """Nothing to save."""


@pytest.fixture
def parts() -> dict[str, Any]:
    model = add_adapters(tiny_model("llama", dtype=torch.float32), rank=2)
    for parameter in trained_tensors(model).values():
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(trained_tensors(model).values())
    optimizer.step()
    return {"model": model, "tokenizer": NoTokenizer(), "optimizer": optimizer}


def test_what_is_saved_is_what_is_loaded_and_only_the_newest_stay(tmp_path: Path, parts: dict[str, Any]) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, RunState(step, 4 * step, 100 * step), **parts, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000010"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # nothing hidden is left either
    saved = {name: tensor.clone() for name, tensor in trained_tensors(parts["model"]).items()}
    moments = {key: value["exp_avg"].clone() for key, value in parts["optimizer"].state_dict()["state"].items()}
    parts["optimizer"].step()
    state = load_checkpoint(
        list_checkpoints(tmp_path)[-1], model=parts["model"], optimizer=parts["optimizer"], device=CPU
    )
    assert state == RunState(10, 40, 1000)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trained_tensors(parts["model"]).items())
    for key, value in parts["optimizer"].state_dict()["state"].items():
        assert torch.equal(value["exp_avg"], moments[key])


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("fault", ["no room", "torch", "adapter", "not allowed", "read-only"])
def test_a_full_disk_is_named_and_the_earlier_checkpoint_stays(
    tmp_path: Path, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    first = save_checkpoint(tmp_path, RunState(1, 1, 1), **parts, keep=1)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}

    def full(*args: object, **options: object) -> None:
        if fault == "torch":  # how torch tells it; the disk is full by then
            monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0))
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        if fault == "read-only":  # and a disk that an error has made read-only
            monkeypatch.setattr(Path, "touch", refuse)
            raise RuntimeError("Parent directory does not exist.")
        raise OSError(errno.EACCES if fault == "not allowed" else errno.ENOSPC, "told by the system")

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "told by the system")

    if fault == "no room":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0))
    else:
        monkeypatch.setattr(
            *((torch, "save") if fault in ("torch", "read-only") else (parts["model"], "save_pretrained")), full
        )
    expected = "may not be written" if fault in ("not allowed", "read-only") else "disk is full, it needs 16\\.\\d MiB"
    with pytest.raises(RunError, match=f"{expected}.*step-000001 stays valid"):
        save_checkpoint(tmp_path, RunState(2, 2, 2), **parts, keep=1)
    assert list_checkpoints(tmp_path) == [first]
    assert before == {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}


def test_an_error_that_is_not_the_disks_is_not_called_one(
    tmp_path: Path, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch, "save", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        save_checkpoint(tmp_path, RunState(1, 1, 1), **parts, keep=1)


def test_a_checkpoint_of_another_model_or_format_is_refused(tmp_path: Path, parts: dict[str, Any]) -> None:
    folder = save_checkpoint(tmp_path, RunState(1, 1, 1), **parts, keep=1)
    other = add_adapters(tiny_model("llama", dtype=torch.float32), rank=3)
    with pytest.raises(RunError, match="does not belong to this model: 28 tensors differ"):
        load_checkpoint(folder, model=other, optimizer=parts["optimizer"], device=CPU)
    (folder / "state.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="format 99"):
        read_state(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(RunError, match=r"state\.json: the state of the run cannot be read"):
        read_state(folder)


@pytest.mark.parametrize("step", [1, 3])
def test_a_disk_that_becomes_read_only_ends_the_run_which_then_goes_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = make_config(train__steps=4, train__save_every=2)
    append, lines = MetricsFile.append, 0

    def refused(file: MetricsFile, record: dict[str, object]) -> None:
        nonlocal lines
        lines += 1
        with monkeypatch.context() as patched:
            if lines == step:
                patched.setattr(Path, "open", read_only)
            append(file, record)

    def read_only(path: Path, mode: str = "r", **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(MetricsFile, "append", refused)
    stays = "no checkpoint was saved yet" if step == 1 else r"step-000002 stays valid"
    with pytest.raises(
        RunError, match=rf"step {step + 1}: .*metrics\.jsonl: cannot be written: this place .*{stays}.*--resume"
    ):
        train(config)
    result = train(config, resume=True)
    assert [record["step"] for record in read_metrics(result.run_dir / "metrics.jsonl")] == [1, 2, 3, 4]


def test_ctrl_c_saves_and_a_kill_leaves_a_usable_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = make_config(train__steps=100_000, train__save_every=1, train__keep_checkpoints=2)
    (tmp_path / "settings.yaml").write_text(config.to_yaml())

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "longfit", "train", *words]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*_source_path(), os.environ.get("PYTHONPATH", "")])}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def wait_for_steps(process: subprocess.Popen[str], count: int) -> None:
        while len(read_metrics(run_dir / "metrics.jsonl")) < count:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)

    process = start(str(tmp_path / "settings.yaml"))
    wait_for_steps(process, 2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"longfit train --run-dir {run_dir} --resume" in told
    assert "Traceback" not in told
    saved = list_checkpoints(run_dir)[-1]
    done = len(read_metrics(run_dir / "metrics.jsonl"))
    assert read_state(saved).step == done

    process = start("--run-dir", str(run_dir), "--resume")
    wait_for_steps(process, done + 2)
    process.kill()
    process.communicate()
    newest = list_checkpoints(run_dir)[-1]
    assert read_state(newest).step > done

    def stop(event: Any) -> None:
        if event.kind == "step":
            os.kill(os.getpid(), signal.SIGINT)

    result = train(config, resume=True, on_event=stop)
    assert result.steps == read_state(newest).step + 1
    steps = [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")]
    assert steps == list(range(1, result.steps + 1))


def _source_path() -> list[str]:
    return [str(Path(longfit.__file__).parent.parent)]
