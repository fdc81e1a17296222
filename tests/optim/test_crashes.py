"""Killed in the middle of a step, a full disk, a read-only place: what ends a process, in a process of its own.

Every script trains the same tiny problem, whose gradients depend on the step alone; what a resumed run must look like
is what an undisturbed run looks like at the same step.
"""

import errno
import gc
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longfit.errors import PagingError
from longfit.optim import adamw
from longfit.optim.adamw import PagedAdamW
from longfit.optim.mapped_frames import MappedFrames

NUMELS = (70_000, 30, 45_000)
PAGE_BYTES = 65_536

PROBLEM = f"""
import os, sys, torch
from longfit.errors import PagingError
from longfit.optim.adamw import PagedAdamW

def make(path, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(numel).bfloat16()) for numel in {NUMELS}]
    options = dict(budget_bytes=3 * {PAGE_BYTES}, path=path, run="mine") | options
    return params, PagedAdamW(params, lr=1e-3, page_bytes={PAGE_BYTES}, **options)

def step(params, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).bfloat16()
    optimizer.step()
"""


def run(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROBLEM + script, str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


problem: dict = {}
exec(PROBLEM, problem)
make, step = problem["make"], problem["step"]


def states(optimizer: PagedAdamW) -> list[torch.Tensor]:
    return [tensor for state in optimizer.state_dict()["state"].values() for tensor in state.values()]


DEATHS = {
    "half of a page written": """
writes = 0
def half_and_die(file, data, offset):
    global writes
    writes += 1
    if writes == 9:
        real(file, data[: len(data) // 2], offset)
        os.kill(os.getpid(), 9)
    return real(file, data, offset)
real, os.pwrite = os.pwrite, half_and_die
""",
    "some pages updated, one of them by half": """
import longfit.optim.parameter_step as parameter_step
batches = 0
def half_and_die(updates):
    global batches
    batches += 1
    if batches == 5:
        updates[0].state.exp_avg[::2] = 123
        os.kill(os.getpid(), 9)
    real(updates)
real, parameter_step.adamw_step = parameter_step.adamw_step, half_and_die
""",
}


@pytest.mark.parametrize("death", DEATHS)
def test_killed_in_the_middle_of_a_step(tmp_path: Path, death: str) -> None:
    """After the commit of step 3 the process is killed in step 4."""
    before = """
params, optimizer = make(sys.argv[1])
for number in range(1, 4):
    step(params, optimizer, number)
optimizer.commit()
torch.save([param.data for param in params], sys.argv[1] + ".params")
print("committed", flush=True)
"""
    after = """
step(params, optimizer, 4)
print("survived", flush=True)
"""
    path = tmp_path / "pages"
    died = run(before + DEATHS[death] + after, path)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert died.stdout == "committed\n"

    params, optimizer = make(path)
    for param, saved in zip(params, torch.load(f"{path}.params"), strict=True):
        param.data.copy_(saved)
    others, undisturbed = make(None, budget_bytes=None)
    for number in range(1, 4):
        step(others, undisturbed, number)
    assert all(torch.equal(a, b) for a, b in zip(states(optimizer), states(undisturbed), strict=True))
    for number in range(4, 8):
        step(params, optimizer, number)
        step(others, undisturbed, number)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_a_full_disk_shows_before_the_first_step_changes_anything(tmp_path: Path) -> None:
    script = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
params, optimizer = make(sys.argv[1])
before = [param.clone() for param in params]
resource.setrlimit(resource.RLIMIT_FSIZE, (5 * {PAGE_BYTES}, resource.RLIM_INFINITY))
for attempt in range(2):
    try:
        step(params, optimizer, 1)
    except PagingError as error:
        print(error)
assert all(torch.equal(a, b) for a, b in zip(params, before))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
step(params, optimizer, 1)
print("goes on when there is room")
"""
    done = run(script, tmp_path / "pages")
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert "the disk is full" in first
    assert "give a path on another disk" in first
    assert "the disk is full" in second
    assert last == "goes on when there is room"


def failing_after(calls: int, function: Callable[..., None]) -> Callable[..., None]:
    """Let the first calls through and fail in those after them."""
    left = iter(range(calls))

    def call(*args: object) -> None:
        if next(left, None) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        function(*args)

    return call


def broken(number: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_disk_that_fills_before_a_commit_keeps_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pages"
    params, optimizer = make(path)
    step(params, optimizer, 1)
    optimizer.commit()
    step(params, optimizer, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken(errno.ENOSPC))
        with pytest.raises(PagingError, match="could not commit the state: the disk is full"):
            optimizer.commit()
    step(params, optimizer, 3)
    del optimizer
    gc.collect()
    _, optimizer = make(path)
    assert {int(state["step"]) for state in optimizer.state_dict()["state"].values()} == {1}


@pytest.mark.parametrize("mapped", [True, False])
def test_a_disk_that_fails_in_the_middle_of_a_step_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    if mapped and sys.platform != "linux":
        pytest.skip("only Linux puts pages of a mapping into a process on demand")
    monkeypatch.setattr(adamw, "can_map", lambda file: mapped)
    params, optimizer = make(tmp_path / "pages")
    step(params, optimizer, 1)
    saved, weights = optimizer.state_dict(), [param.detach().clone() for param in params]
    step(params, optimizer, 2)
    expected = [param.detach().clone() for param in params]

    with monkeypatch.context() as patch:
        if mapped:
            patch.setattr(MappedFrames, "_populate", failing_after(2, MappedFrames._populate))
        else:
            patch.setattr(os, "pwrite", broken(errno.EIO))
        with pytest.raises(PagingError, match="look at the disk, then resume from the last checkpoint"):
            optimizer.step()
    for attempt in (optimizer.step, optimizer.state_dict, optimizer.commit):
        with pytest.raises(PagingError, match="the last step stopped in the middle"):
            attempt()

    with torch.no_grad():
        for param, weight in zip(params, weights, strict=True):
            param.copy_(weight)
    optimizer.load_state_dict(saved)
    step(params, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


def test_a_read_only_place_is_named() -> None:
    """As an ordinary user, whom permissions bind: root would be let through, and pytest's folder is root's alone."""
    script = """
make(None, budget_bytes=None)  # imports what an ordinary user may not be able to read
if os.geteuid() == 0:
    os.seteuid(65534)
for path in (sys.argv[1] + "/new", sys.argv[1] + "/owned"):
    try:
        make(path)
    except PagingError as error:
        print(error)
"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "owned").touch(0o444)
        folder.chmod(0o555)
        done = run(script, folder)
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("may not be written" in line and "give a path that this user may write" in line for line in lines)


def test_the_file_goes_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    script = """
params, optimizer = make(sys.argv[1])
step(params, optimizer, 1)
assert os.path.exists(sys.argv[1])
"""
    done = run(script, path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
