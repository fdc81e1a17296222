"""Processes of a run, started, ended badly, and told about once."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import indent
from types import SimpleNamespace

import pytest
from tests.parallel.forked import run_in_processes
from tests.training.conftest import MakeConfig

import longfit
from longfit.config import RunConfig
from longfit.errors import ConfigError, DataError, LongfitError, ProcessesError
from longfit.parallel.launch import Place, _error_of, _order, is_started, leave_reason
from longfit.training.loop import train

SOURCES = str(Path(longfit.__file__).parent.parent)


def failure(*, exitcode: int = 1, record: dict[str, str] | None = None, timestamp: int = 5) -> object:
    data = {"message": record if record is not None else "<NONE>"}
    return SimpleNamespace(exitcode=exitcode, error_file_data=data, timestamp=timestamp)


def test_the_place_of_a_process_is_torchruns() -> None:
    assert Place.of({"RANK": "3", "WORLD_SIZE": "4"}) == Place(3, 4)
    assert Place.of({}) == Place(0, 1)
    assert is_started({"RANK": "0", "WORLD_SIZE": "1"})
    assert not is_started({})


def test_the_cause_is_told_and_not_its_consequence() -> None:
    killed = failure(exitcode=-signal.SIGKILL)
    left = failure(record={"kind": "RuntimeError", "text": "RuntimeError: ... Connection closed by peer [::1]"})
    assert min({0: left, 1: killed}.items(), key=_order) == (1, killed)
    told_of = failure(record={"kind": "ProcessesError", "text": "not heard of for 8 s: process 1 of 2"})
    assert min({0: killed, 1: told_of}.items(), key=_order) == (1, told_of)
    ended = failure(exitcode=-signal.SIGTERM)  # by the agent, in the same second
    assert min({0: ended, 1: killed}.items(), key=_order) == (1, killed)
    told = str(_error_of(1, killed, 2))
    assert told.startswith("process 1 of 2 was ended by SIGKILL, which is how the system ends a process when memory")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"kind": "DataError", "text": "a.txt: no text"}, DataError("a.txt: no text")),
        ({"kind": "PlanError", "text": "out"}, ProcessesError("process 1 of 2: out; the others were ended")),
        ({"kind": "KeyError", "text": "KeyError: 7"}, ProcessesError("process 1 of 2: KeyError: 7; the others were ended")),  # noqa: E501
    ],
)  # fmt: skip
def test_users_errors_are_raised_again_and_others_with_the_process(
    record: dict[str, str], expected: LongfitError
) -> None:
    error = _error_of(1, failure(record=record), 2)
    assert (type(error), str(error)) == (type(expected), str(expected))


def test_a_reason_is_left_where_the_agent_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert not leave_reason(ConfigError("wrong"))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("LONGFIT_STARTED_PROCESSES", "1")
    assert leave_reason(ConfigError("wrong"))
    record = json.loads((tmp_path / "error.json").read_text())["message"]
    assert (record["kind"], record["text"]) == ("ConfigError", "wrong")
    monkeypatch.delenv("LONGFIT_STARTED_PROCESSES")
    assert not leave_reason(ConfigError("wrong"))  # torchrun reads it, but shows it as its own


BEFORE = """
import os
if "RANK" in os.environ:
    try:
{also}
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(99)
"""


def start(config: RunConfig, *, also: str = "") -> subprocess.Popen[str]:
    """Start two processes; ``also`` is Python that each runs before longfit, and ends it where it fails."""
    run = Path(str(config.output.run_dir))
    (run.parent / "sitecustomize.py").write_text(BEFORE.format(also=indent(also or "pass", "        ")))
    (run.parent / "run.yaml").write_text(config.to_yaml())
    return subprocess.Popen(
        [sys.executable, "-m", "longfit", "train", "run.yaml", "--devices", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=run.parent,
        env={**os.environ, "PYTHONPATH": f"{run.parent}{os.pathsep}{SOURCES}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def workers_of(agent: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"longfit" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for_step(run: Path, step: int, agent: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 600  # the imports of three processes, on a busy machine
    while time.monotonic() < until and agent.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: {agent.communicate()}")


def losses(run: Path) -> list[object]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records if "loss" in record]


KILLS = int(os.environ.get("LONGFIT_TEST_KILLS", "1"))
"""Kills of a random process at a random step; 30 on request."""


SLOW = """
import time
import longfit.training.loop as loop
original = loop.take_step
def take_step(run, *arguments):
    if run.state.step >= {step}:
        time.sleep(0.3)
    while run.state.step >= {step} + 8:
        with run.heartbeat.patient():
            time.sleep(1)
    return original(run, *arguments)
loop.take_step = take_step
"""
"""A run that is in the middle of a step when it is killed, and not over however late the test gets its turn."""


def go_on(rank: int, config: RunConfig, resume: bool) -> bool:
    return train(config, resume=resume).finished


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="finds the processes of a run through Linux's /proc"
)


@needs_proc
@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_process_ends_the_run_with_one_message_and_the_run_goes_on_as_it_would_have(
    make_config: MakeConfig, tmp_path: Path, number: int
) -> None:
    chance = random.Random(number)
    settings: dict[str, object] = {"train__steps": 30, "train__save_every": 3, "parallel__shard": 1 + number % 2}
    step = chance.randint(4, 10)
    broken = start(make_config(**settings), also=SLOW.format(step=step))
    wait_for_step(tmp_path / "run", step, broken)
    began = time.monotonic()
    os.kill(chance.choice(workers_of(broken)), signal.SIGKILL)
    told = broken.communicate(timeout=60)[1]
    assert time.monotonic() - began < 60  # parallel.timeout
    assert broken.returncode == 2
    errors = [line for line in told.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert re.search(r"process \d of 2 was ended by SIGKILL", errors[0])
    assert "Traceback" not in told
    assert 4 <= len(losses(tmp_path / "run")) < 30
    assert run_in_processes(go_on, 2, make_config(**settings), True, group=False) == [True, True]
    whole = tmp_path.parent / f"whole-{settings['parallel__shard']}"
    if not (whole / "adapter").exists():  # the run that was left alone, once for all kills
        unbroken = make_config(**settings, output__run_dir=str(whole))
        assert run_in_processes(go_on, 2, unbroken, False, group=False) == [True, True]
    assert losses(tmp_path / "run") == losses(whole)


RUNS_OUT = """
import longfit.training.step as step
original = step._differentiate
def differentiate(run, *arguments):
    if run.state.step == 4 and run.rank == 1:
        raise MemoryError("no room for 9 GiB")
    return original(run, *arguments)
step._differentiate = differentiate
"""


def test_a_process_that_runs_out_of_memory_ends_all_with_its_reason(make_config: MakeConfig, tmp_path: Path) -> None:
    settings: dict[str, object] = {"train__steps": 6, "train__save_every": 3, "parallel__shard": 2}
    process = start(make_config(**settings), also=RUNS_OUT)
    wait_for_step(tmp_path / "run", 4, process)
    began = time.monotonic()
    told = process.communicate(timeout=60)[1]
    assert time.monotonic() - began < 60  # parallel.timeout
    assert process.returncode == 2
    errors = [line for line in told.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith(
        "error: process 1 of 2: out of memory (no room for 9 GiB); choose a smaller engine.tile"
    )
    assert run_in_processes(go_on, 2, make_config(**settings), True, group=False) == [True, True]


@needs_proc
@pytest.mark.skipif("LONGFIT_TEST_KILLS" not in os.environ, reason="takes half a minute: set LONGFIT_TEST_KILLS")
def test_a_frozen_process_ends_the_run_within_the_time_out(make_config: MakeConfig, tmp_path: Path) -> None:
    timeout = 10
    frozen = start(make_config(train__steps=2000, parallel__timeout=timeout))
    wait_for_step(tmp_path / "run", 2, frozen)
    began = time.monotonic()
    os.kill(workers_of(frozen)[1], signal.SIGSTOP)
    told = frozen.communicate(timeout=60)[1]
    assert time.monotonic() - began < timeout + 10  # the agent and the ends of the interpreters, on a busy machine
    assert "process 1 of 2" in told.splitlines()[-1]
    assert "frozen or gone" in told.splitlines()[-1]
