"""Threads: physical cores, of those allowed, no more than the quota; what the user said stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longfit.kernels.cpu import threads


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_hyper_threads_of_one_core_are_one(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,4", "1,5", "2", "3", "0,4", "1,5"]):
        write(tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list", siblings + "\n")
    assert threads.physical_cores(range(6), root=tmp_path) == 4
    assert threads.physical_cores([0, 4], root=tmp_path) == 1
    assert threads.physical_cores([0, 1, 9], root=tmp_path) == 3, "one that the system does not describe is a core"


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"a/b": "150000 100000"}, 1.5),
        ({"a/b": "max 100000", "a": "200000 100000"}, 2.0),
        ({"a/b": "400000 100000", "a": "50000 100000"}, 0.5),
        ({"a/b": "max 100000"}, None),
        ({"a/b": "nonsense"}, None),
        ({}, None),
    ],
)
def test_the_smallest_quota_of_all_groups_above_binds(
    tmp_path: Path, quotas: dict[str, str], expected: float | None
) -> None:
    for group, text in quotas.items():
        write(tmp_path / "cgroup" / group / "cpu.max", text + "\n")
    write(tmp_path / "own", "5:memory:/x\n0::/a/b\n")
    assert threads.cgroup_quota(own=tmp_path / "own", root=tmp_path / "cgroup") == expected


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert threads.cgroup_quota(own=tmp_path / "missing", root=tmp_path) is None
    write(tmp_path / "own", "5:memory:/x\n")
    assert threads.cgroup_quota(own=tmp_path / "own", root=tmp_path) is None


@pytest.mark.parametrize(("quota", "cores", "expected"), [(None, 4, 4), (1.5, 4, 1), (0.5, 4, 1), (8.0, 2, 2)])
def test_usable_cores(monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int, expected: int) -> None:
    monkeypatch.setattr(threads, "cgroup_quota", lambda: quota)
    monkeypatch.setattr(threads, "physical_cores", lambda cpus: cores)
    assert threads.usable_cores() == expected


@pytest.mark.skipif((os.cpu_count() or 1) < 2 or not hasattr(os, "sched_setaffinity"), reason="one processor only")
def test_the_command_line_computes_with_the_cores_it_may_use_and_with_what_the_user_says() -> None:
    code = (
        "import os, sys; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])\n"
        "from longfit.cli.app import main\n"
        "main(['--version'])\n"
        "import torch; print(torch.get_num_threads())"
    )
    for said, expected in ((None, "1"), ("2", "2")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment["PYTHONPATH"] = str(Path(threads.__file__).parents[3])
        environment |= {} if said is None else {"OMP_NUM_THREADS": said}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split()[-1] == expected
