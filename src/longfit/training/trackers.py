"""Trackers: processes of their own that read what ``metrics.jsonl`` gets and tell it to TensorBoard, Trackio or W&B.

A run only starts them and, at its end, closes their input. It never waits for one while it trains, hands them nothing
and holds nothing for them, and they run at the lowest priority: a tracker that is down, slow or full can therefore
neither stop a run nor slow it, and what it missed is still in the file. At its end a run waits for them for a
two-hundredth of the time that it took. Nothing leaves the machine unless the user's environment says so
(WANDB_MODE=online).

This file imports only the standard library, because it is also the program that such a process runs.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event as Flag
from threading import Thread
from typing import Any

from longfit.errors import ConfigError

POLL_SECONDS = 1.0
LAST_WAIT_SECONDS = 10.0  # for a tracker to finish once the run has ended,
LAST_WAIT_SHARE = 0.005  # and no more than this part of the run's own time: starting them adds to it

Sink = Callable[[int, dict[str, float]], None]


class Trackers:
    """The trackers of a run."""

    def __init__(self, names: Sequence[str], run_dir: Path, *, from_step: int) -> None:
        """Start one process a tracker; lines up to ``from_step`` have been told before."""
        self.run_dir, self._began = run_dir, time.monotonic()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._problems: list[str] = []
        for name in names:
            try:
                self._start(name, from_step)
            except OSError as error:
                self._problems.append(f"{name} did not start ({error}); the run goes on without it")

    def _start(self, name: str, from_step: int) -> None:
        log = self._log(name)
        log.parent.mkdir(exist_ok=True)
        # -P: this folder's files have names of their own that other packages may import.
        arguments = [sys.executable, "-P", str(Path(__file__)), name, str(self.run_dir), str(from_step)]
        with log.open("ab") as file:
            self._processes[name] = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                # Ctrl-C is not for it; but a session of its own would have a share of the processors, as Linux shares
                # them out between sessions first, whatever the priorities in them.
                process_group=0,
            )

    def _log(self, name: str) -> Path:
        return self.run_dir / "trackers" / f"{name}.log"

    def finish(self, *, wait: float | None = None) -> list[str]:
        """Tell them that the run has ended, and wait a little (``wait`` seconds).

        Returns: what went wrong, a line a tracker.
        """
        problems = list(self._problems)
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        if wait is None:
            wait = min(LAST_WAIT_SECONDS, LAST_WAIT_SHARE * (time.monotonic() - self._began))
        deadline = time.monotonic() + wait
        for name, process in self._processes.items():
            log = self._log(name)
            try:
                code = process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                problems.append(f"{name} is still busy and goes on by itself; see {log}")
                continue
            if code:
                problems.append(f"{name} failed; the run is complete without it, see {log}")
        return problems


def missing(names: Sequence[str]) -> list[str]:
    """Trackers whose package is not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that is not installed."""
    lacking = missing(names)
    if lacking:
        raise ConfigError(
            f"output.track: {', '.join(lacking)} is not installed; pip install {' '.join(lacking)}"
            " (or 'longfit[track]' for tensorboard and trackio), or drop it"
        )


# ------------------------------------------------------------------------------------------------ the process
def follow(path: Path, ended: Flag, *, from_step: int, poll: float = POLL_SECONDS) -> Iterator[dict[str, Any]]:
    """Yield the lines of ``metrics.jsonl`` as they are written, until the run has ended and all are read."""
    position = 0
    while True:
        last = ended.is_set()  # asked before reading: what was written before the end is read after it
        if path.is_file():
            with path.open("rb") as file:
                file.seek(position)
                lines = file.read().split(b"\n")
            for line in lines[:-1]:  # what follows the last line break is torn or empty
                position += len(line) + 1
                record = json.loads(line)
                if record["step"] > from_step:
                    yield record
        if last:
            return
        ended.wait(poll)


def numbers_of(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line, without its step."""
    return {
        key: float(value)
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


@contextlib.contextmanager
def open_sink(name: str, run_dir: Path) -> Iterator[Sink]:
    """The function that tells a tracker the numbers of a step."""
    if name == "tensorboard":
        from tensorboard.summary import Writer

        writer = Writer(str(run_dir / "trackers" / "tensorboard"))

        def tell(step: int, numbers: dict[str, float]) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        yield tell
        writer.close()
        return
    if name == "wandb":
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_DIR", str(run_dir / "trackers"))
        os.environ.setdefault("WANDB_SILENT", "true")
    tracker = importlib.import_module(name)
    tracker.init(project="longfit", name=run_dir.name)
    yield lambda step, numbers: tracker.log(numbers, step=step)
    tracker.finish()


def main(name: str, run_dir: Path, from_step: int) -> None:
    """Run until standard input is closed: the run has ended, or its process is gone."""
    ended = Flag()

    def wait_for_end() -> None:
        sys.stdin.buffer.read()
        ended.set()

    if hasattr(os, "nice"):
        os.nice(19)  # the run has the processors first
    Thread(target=wait_for_end, daemon=True).start()
    with open_sink(name, run_dir) as tell:
        for record in follow(run_dir / "metrics.jsonl", ended, from_step=from_step):
            tell(int(record["step"]), numbers_of(record))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
