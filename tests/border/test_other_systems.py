"""What Windows and macOS do otherwise, by stubs of what they do: each of them once.

Read-only flushes, code pages and Windows' lock are in ``tests/files/test_writing.py``.
"""

import ast
import errno
import os
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import longfit
from longfit.config import RunConfig
from longfit.data import files
from longfit.errors import RunError
from longfit.files import lock, writing
from longfit.parallel import processes
from longfit.training import run_directory
from longfit.training.metrics import ignore

PACKAGE = Path(longfit.__file__).parent


def test_macos_flushes_to_the_disk_and_not_only_to_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    flushed: list[str] = []

    def fullfsync(descriptor: int, command: int) -> None:
        flushed.append("full")
        if len(flushed) > 1:  # a network file system does not know it
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(writing, "sys", types.SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(fcntl, "fcntl", fullfsync)
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append("fsync"))
    with (tmp_path / "x").open("w") as file:
        writing.flush(file.fileno())
        assert flushed == ["full"]
        writing.flush(file.fileno())
        assert flushed == ["full", "full", "fsync"]


def test_a_name_that_differs_in_case_only_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub of a file system that finds ``run`` by the name ``RUN``."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")

    def folded(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(path: Any, *words: Any, **more: Any) -> Any:
            name = os.fspath(path) if not isinstance(path, int) else path
            return call(name.replace("RUN", "run") if isinstance(name, str) else name, *words, **more)

        return called

    for name in ("stat", "mkdir", "open", "listdir", "scandir"):
        monkeypatch.setattr(os, name, folded(getattr(os, name)))
    config = RunConfig.of({"model.name": "m", "data.path": "d", "output.run_dir": str(tmp_path / "RUN")})
    with (
        pytest.raises(RunError, match="already exists and is not overwritten"),
        run_directory.claimed(config, resume=False, on_event=ignore),
    ):
        pass


def test_endings_are_read_in_any_case() -> None:
    assert files.kind_of("NOTES.TXT") == "text"
    assert files.kind_of("Rows.JSONL.GZ") == "jsonl"


def test_no_process_is_asked_for_by_a_signal() -> None:
    """On Windows ``os.kill(pid, 0)`` ends the process that it asks for; whether a lock is held tells the lock."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            of_os = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
            if of_os and node.attr in ("kill", "killpg", "fork", "getuid", "geteuid"):
                found.append((path.relative_to(PACKAGE).as_posix(), node.attr))
    assert found == [("parallel/processes.py", "kill")]  # which is there to end it


def test_a_frozen_process_is_ended_where_there_is_no_sigkill(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(processes, "signal", types.SimpleNamespace(SIGTERM=signal.SIGTERM))
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    processes._kill(12345)
    assert sent == [(12345, signal.SIGTERM)]


def test_without_proc_no_file_system_is_called_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither macOS nor Windows has ``/proc``."""
    read = Path.read_text

    def refused(path: Path, *words: Any, **more: Any) -> str:
        if path.parts[:2] == ("/", "proc"):
            raise FileNotFoundError(errno.ENOENT, "no /proc", str(path))
        return read(path, *words, **more)

    monkeypatch.setattr(Path, "read_text", refused)
    held = lock.FolderLock(tmp_path).take()
    assert held.doubt is None
    held.release()


@pytest.mark.parametrize("module", ["longfit.data.rendering", "longfit.data.chat_workers"])
def test_what_runs_in_another_process_is_started_and_not_forked(module: str) -> None:
    """`spawn` is all that Windows has: the process imports a file of ours, which imports nothing heavy."""
    tree = ast.parse((PACKAGE.parent / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"torch", "transformers", "multiprocessing"}
