"""Trackers get every line, and cannot stop or slow a run: failing, hanging, missing ones are said at its end."""

import json
import os
import sys
import time
from pathlib import Path
from threading import Event as Flag
from threading import Thread

import pytest
from tests.training.conftest import MakeConfig

from longfit.errors import ConfigError
from longfit.training import trackers
from longfit.training.loop import train
from longfit.training.trackers import Trackers, follow, numbers_of

FAKE = """
import json, os, time
def init(project, name):
    if os.environ.get("FAKE") == "fails":
        raise RuntimeError("no account")
    if os.environ.get("FAKE") == "hangs":
        time.sleep(600)
    print("mode", os.environ.get("WANDB_MODE"), "niceness", os.nice(0), flush=True)
    print("session", os.getsid(0), "group", os.getpgid(0) == os.getpid(), flush=True)
def log(numbers, step):
    print(json.dumps([step, numbers]), flush=True)
def finish():
    print("finished", flush=True)
"""


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch) -> None:
    """A package of wandb's name that prints what it is told."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "wandb.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(trackers, "LAST_WAIT_SECONDS", 60.0)
    monkeypatch.setattr(trackers, "LAST_WAIT_SHARE", 1e9)  # a run of two seconds would not wait for one to start
    yield
    sys.modules.pop("wandb", None)


def test_a_tracker_gets_every_line_of_the_metrics(fake_wandb, make_config: MakeConfig) -> None:
    events = []
    result = train(make_config(output__track=["wandb"], train__steps=3), on_event=events.append)
    said = (result.run_dir / "trackers" / "wandb.log").read_text().splitlines()
    assert said[0] == "mode offline niceness 19"
    # Not a session of its own, in which its priority would count among its own processes only.
    assert said[1] == f"session {os.getsid(0)} group True"
    assert said[-1] == "finished"
    told = [json.loads(line) for line in said[2:-1]]
    written = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert told == [[record["step"], numbers_of(record)] for record in written]
    assert not [event for event in events if event.kind == "warning" and "wandb" in event.text]


def test_a_tracker_that_fails_leaves_the_run_complete(fake_wandb, make_config: MakeConfig, monkeypatch) -> None:
    monkeypatch.setenv("FAKE", "fails")
    events = []
    result = train(make_config(output__track=["wandb"], train__steps=2), on_event=events.append)
    assert result.finished
    assert any("wandb failed; the run is complete without it" in event.text for event in events)
    assert "no account" in (result.run_dir / "trackers" / "wandb.log").read_text()


def test_a_tracker_that_hangs_is_left_to_itself(fake_wandb, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FAKE", "hangs")
    began = time.monotonic()
    started = Trackers(["wandb"], tmp_path, from_step=0)
    assert time.monotonic() - began < 5  # starting a process, never waiting for it
    assert "is still busy and goes on by itself" in started.finish(wait=0.2)[0]
    started._processes["wandb"].kill()
    started._processes["wandb"].wait()


def test_the_last_wait_is_a_two_hundredth_of_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FAKE", "hangs")
    started = Trackers(["wandb"], tmp_path, from_step=0)
    started._began = time.monotonic() - 20
    asked: list[float] = []
    monkeypatch.setattr(started._processes["wandb"], "wait", lambda timeout: asked.append(timeout) or 0)
    assert started.finish() == []
    assert 0.09 < asked[0] <= 0.005 * (time.monotonic() - started._began)
    started._began = time.monotonic() - 100_000
    started.finish()
    assert 9 < asked[1] <= 10
    started._processes["wandb"].kill()


def test_one_that_cannot_be_started_is_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trackers.subprocess, "Popen", lambda *a, **k: (_ for _ in ()).throw(OSError("no memory")))
    assert Trackers(["wandb"], tmp_path, from_step=0).finish() == [
        "wandb did not start (no memory); the run goes on without it"
    ]


def test_following_waits_for_whole_lines_and_skips_what_was_told(tmp_path: Path) -> None:
    path, ended, found = tmp_path / "metrics.jsonl", Flag(), []
    thread = Thread(target=lambda: found.extend(follow(path, ended, from_step=1, poll=0.01)))
    thread.start()
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    time.sleep(0.05)
    with path.open("a") as file:
        file.write('ep": 3}\n{"torn')
    ended.set()
    thread.join()
    assert found == [{"step": 2}, {"step": 3}]


def test_tensorboard_gets_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "best": true, "why": "no number"}\n')
    started = Trackers(["tensorboard"], tmp_path, from_step=0)
    assert started.finish(wait=60) == []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "trackers" / "tensorboard"))
    read.Reload()
    (tag,) = [name for names in read.Tags().values() if isinstance(names, list) for name in names]
    assert tag == "loss"


def test_one_that_is_not_installed_is_refused_before_anything(make_config: MakeConfig, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"output\.track: trackio is not installed; pip install trackio"):
        train(make_config(output__track=["trackio"]))
    assert not (tmp_path / "run").exists()
