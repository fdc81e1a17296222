"""Runs commands of longfit in forks of one process that has imported everything: each takes less than a second.

Each fork has a limit on its address space and on its time, in which it has a processor or waits for something else;
what it printed, how it ended and how much memory it took come back. ``python -m tests.border.server`` reads requests, a
JSON object a line, and answers likewise.
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

LIMIT_S = 30.0  # in which it waits for no processor: on a busy machine nothing hangs that would not on another
MOST_BYTES = 2 << 30  # that a command may take above what it begins with
FILLER = "filler"
ADDRESS_SPACE = 6 << 30  # above what it begins with: a fork must not take the machine's memory


@dataclass(frozen=True)
class Reply:
    """How a command ended.

    Attributes:
        code: None where it had to be killed.
        seconds: from its beginning to its end, but for those in which it waited for a processor.
        cpu_s: of a processor.
        grown_bytes: of memory, above what it began with.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    cpu_s: float
    grown_bytes: int


class Server:
    """A warm process, from entering to leaving."""

    def __init__(self, *, cwd: Path) -> None:
        self._cwd = cwd

    def __enter__(self) -> "Server":
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "RUST_BACKTRACE": "0",
            "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
            "LONGFIT_CACHE": str(self._cwd / "cache"),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.border.server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self._cwd, env=environment,
        )  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def warm(self, *commands: Sequence[object], cwd: Path) -> None:
        """Run commands in the process itself, so that its forks find what those import and build."""
        self._ask({"warm": [list(map(str, words)) for words in commands], "cwd": str(cwd)})

    def run(
        self, *words: object, cwd: Path, limits: bool = True, kill_after: float | None = None,
        fill_after: float | None = None, break_after: float | None = None, breaker: Path | None = None,
        end_at: int | None = None, cache: Path | None = None,
    ) -> Reply:  # fmt: skip
        """Run a command to its end, or kill it.

        Args:
            limits: of time and address space.
            kill_after, fill_after, break_after: seconds after which it is killed, the disk of ``cwd`` is filled, or
                ``breaker`` is written to, which makes an error in a file system.
            end_at: the step whose checkpoint is the last thing that a training does.
            cache: the cache folder of the command.
        """
        request: dict[str, object] = {"words": [str(word) for word in words], "cwd": str(cwd), "limits": limits}
        request |= {"kill_after": kill_after, "end_at": end_at, "cache": None if cache is None else str(cache)}
        after = fill_after if fill_after is not None else break_after
        request["disk"] = None if after is None else [after, str(cwd), None if breaker is None else str(breaker)]
        return Reply(**self._ask(request))

    def _ask(self, request: dict[str, object]) -> dict[str, object]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended with {self._process.wait()}")
        answer: dict[str, object] = json.loads(line)
        return answer


def serve() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the warming prints is not an answer
    for line in sys.stdin:
        request = json.loads(line)
        if "warm" in request:
            _warm(request["warm"], request["cwd"])
            answer: dict[str, object] = {}
        else:
            answer = _forked(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _warm(commands: list[list[str]], cwd: str) -> None:
    import gc

    from longfit.cli.app import main
    from longfit.data.template_process import template_process

    template_process().limit_s = 3  # that templates are ended is to be seen, not that it takes so long
    os.chdir(cwd)
    for words in commands:
        with tempfile.TemporaryFile() as sink:
            kept = os.dup(1), os.dup(2)
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            try:
                code = main(words)
            finally:
                sys.stdout.flush()
                for number, descriptor in enumerate(kept, start=1):
                    os.dup2(descriptor, number)
                    os.close(descriptor)
            if code:
                sink.seek(0)
                raise RuntimeError(f"{words}: exit {code}: {sink.read().decode(errors='replace')}")
    gc.collect()
    gc.freeze()


def _forked(
    words: list[str], cwd: str, *, limits: bool, kill_after: float | None, end_at: int | None, cache: str | None,
    disk: tuple[float, str, str | None] | None,
) -> dict[str, object]:  # fmt: skip
    began = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        before = os.memfd_create("before")  # of the fork: it has none of the memory that this process maps from files
        child = os.fork()
        if not child:
            os.write(before, str(_bytes_of("VmRSS")).encode())
            if cache is not None:
                os.environ["LONGFIT_CACHE"] = cache
            _run(words, cwd, out.fileno(), err.fileno(), limits=limits, end_at=end_at)
        most_s = kill_after if kill_after is not None else LIMIT_S if limits else math.inf
        status, usage, seconds, killed = _wait(child, began, most_s, disk)
        began_with = int(os.pread(before, 20, 0) or b"0")
        os.close(before)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    code = None if killed else os.waitstatus_to_exitcode(status)
    return {
        "code": code,
        "out": texts[0],
        "err": texts[1],
        "seconds": seconds,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "grown_bytes": max(0, usage.ru_maxrss * 1024 - began_with),
    }


def _run(words: list[str], cwd: str, out: int, err: int, *, limits: bool, end_at: int | None) -> None:
    code = 99
    try:
        os.setsid()
        os.chdir(cwd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        if limits:
            most = _bytes_of("VmSize") + ADDRESS_SPACE
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        from longfit.cli.app import main

        if end_at is not None:
            _end_after_checkpoint(end_at)
        code = main(words)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _end_after_checkpoint(step: int) -> None:
    from longfit.training import loop

    save = loop.save_checkpoint

    def save_and_end(*arguments: Any, **settings: Any) -> None:
        if save(*arguments, **settings).name.endswith(f"-{step:06d}"):
            os._exit(0)

    loop.save_checkpoint = save_and_end  # type: ignore[assignment]


def _wait(
    child: int, began: float, limit_s: float, disk: tuple[float, str, str | None] | None
) -> tuple[int, resource.struct_rusage, float, bool]:
    killed = False
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        passed = time.monotonic() - began
        if passed > limit_s and not killed and passed - _waited_s(child) > limit_s:
            killed = True
            for kill in (os.killpg, os.kill):  # the second where it has no group of its own yet
                with suppress(ProcessLookupError):
                    kill(child, signal.SIGKILL)
        if disk is not None and passed > disk[0] and passed - _waited_s(child) > disk[0]:
            if disk[2] is None:
                _fill(Path(disk[1]))
            else:
                Path(disk[2]).write_text("an error")
            disk = None
        time.sleep(0.002)
    seconds = time.monotonic() - began - _waited_s(child)
    _, status, usage = os.wait4(child, 0)
    return status, usage, seconds, killed


def _waited_s(child: int) -> float:
    """Seconds in which a process could have run, and had no processor."""
    with suppress(OSError):
        return int(Path(f"/proc/{child}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def _fill(folder: Path) -> None:
    """Write a file until the disk is full."""
    with suppress(OSError), (folder / FILLER).open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def _bytes_of(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


if __name__ == "__main__":
    serve()
