"""Start the processes of a run on this machine, and say once why they ended.

The agent is torchrun's, called through its library: it gives each process its rank, watches all of them, and when one
ends badly it ends the others. What it lacks is one message for the user: each process leaves its reason in the file
that the agent names for it, and who started them tells the first.

Several machines are started by ``torchrun ... -m longfit train ...`` on each; then nothing here is called, and the
processes find their ranks in the environment all the same.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from longfit import errors
from longfit.errors import ConfigError, LongfitError, ProcessesError
from longfit.kernels.cpu.threads import usable_cores

GRACE_S = 10
"""Seconds between asking the processes of an interrupted run to end and making them: enough to finish a file, or to
save the adapters of the last whole step."""

INTERRUPTED = 130
"""Exit code of processes that stopped early on request and saved what they had."""

_STARTED = "LONGFIT_STARTED_PROCESSES"
_ALIKE = ("ConfigError", "ContextError", "DataError", "ModelError", "ProcessesError")
"""Errors that every process would tell alike, or that name the process themselves."""

_OTHER_HAS_GONE = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "DistNetworkError"),
    "the store of the run does not answer",
)
"""What gloo and the store say when the process at the other end has ended."""


@dataclass(frozen=True)
class Place:
    """Which of the processes of a run this one is, as torchrun's variables say."""

    rank: int = 0
    num_processes: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Place":
        """Read the environment of a process; without these variables it is alone."""
        return cls(int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1")))


def is_started(environment: Mapping[str, str]) -> bool:
    """Whether torchrun or `start_processes` has started this process as one of a run's."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def is_started_here(environment: Mapping[str, str]) -> bool:
    """Whether `start_processes` has, so that all processes of the run are on this machine."""
    return _STARTED in environment


def start_processes(arguments: Sequence[str], *, devices: int) -> int:
    """Run ``python -m longfit`` with these arguments in as many processes as there are devices, and wait.

    Args:
        arguments: of the command line, as this process got them.
        devices: processes, one a device.
    Returns: 0, or `INTERRUPTED` when they stopped early on request.
    Raises: ConfigError: this machine has fewer cards. ProcessesError: one ended badly; the message says which and why.
        What a process raised because of the user's settings or data is raised here again.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    _require_cards(devices)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it logs is told below, once
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None or int(threads) == usable_cores():  # the user's own number stays
        os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // devices))
    os.environ[_STARTED] = "1"
    try:
        with _patient_with_interrupts():
            elastic_launch(_agent_settings(devices), sys.executable)("-m", "longfit", *arguments)
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=_order)
        if first.exitcode == INTERRUPTED:
            return INTERRUPTED
        raise _error_of(rank, first, devices) from None
    finally:
        os.environ.pop(_STARTED, None)
    return 0


def leave_reason(error: BaseException) -> bool:
    """Write why this process ends where the agent looks for it.

    Returns: whether `start_processes` reads it; if not, the process should say it itself.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return False
    kind, text = type(error).__name__, str(error)
    record = {"kind": kind, "text": text if isinstance(error, LongfitError) else f"{kind}: {text}"}
    about = {"message": f"{kind}: {text}", "extraInfo": {"timestamp": str(int(time.time()))}, **record}
    unfinished = Path(f"{path}.unfinished")
    unfinished.write_text(json.dumps({"message": about}), encoding="utf-8")
    unfinished.replace(path)
    return is_started_here(os.environ)


def _agent_settings(devices: int) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    settings: dict[str, Any] = {
        "min_nodes": 1,
        "max_nodes": 1,
        "nproc_per_node": devices,
        "run_id": f"longfit-{os.getpid()}",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "local_addr": "localhost",
        "max_restarts": 0,
        "signals_to_handle": "SIGTERM,SIGHUP,SIGQUIT",
        "shutdown_timeout": GRACE_S,
    }
    known = {field.name for field in fields(LaunchConfig)}  # the last two are younger than the others
    return LaunchConfig(**{name: value for name, value in settings.items() if name in known})


def _require_cards(devices: int) -> None:
    import torch

    cards = torch.cuda.device_count()
    if 0 < cards < devices:
        raise ConfigError(f"--devices {devices}: this machine has {cards} CUDA devices; try --devices {cards}")


@contextmanager
def _patient_with_interrupts() -> Iterator[None]:
    """Leave the first Ctrl-C to the processes, which get it from the terminal too and save; the second ends them."""
    before = signal.getsignal(signal.SIGINT)

    def once(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _order(item: tuple[int, Any]) -> tuple[bool, bool, int, int]:
    """Order ranks and their failures: causes before consequences, verdicts about all of them first, then by time.

    The agent ends the others by SIGTERM, and may have done so before it looks who has failed; who finds a frozen
    process ends it by SIGKILL, and has said so.
    """
    rank, failure = item
    consequence = failure.exitcode == -signal.SIGTERM or any(
        sign in _record(failure).get("text", "") for sign in _OTHER_HAS_GONE
    )
    return consequence, _record(failure).get("kind") != "ProcessesError", failure.timestamp, rank


def _record(failure: Any) -> dict[str, str]:
    """What a process left; empty if it had no time to."""
    message = failure.error_file_data.get("message")
    return message if isinstance(message, dict) and "kind" in message else {}


def _error_of(rank: int, failure: Any, devices: int) -> LongfitError:
    record = _record(failure)
    if record.get("kind") in _ALIKE:
        kind: type[LongfitError] = getattr(errors, record["kind"])
        return kind(record["text"])
    who = f"process {rank} of {devices}"
    if record:
        return ProcessesError(f"{who}: {record['text']}; the others were ended")
    if failure.exitcode >= 0:
        return ProcessesError(f"{who} ended with exit code {failure.exitcode} and left no reason; so were the others")
    name = signal.Signals(-failure.exitcode).name
    advice = ", which is how the system ends a process when memory runs out" if name == "SIGKILL" else ""
    return ProcessesError(
        f"{who} was ended by {name}{advice}; the others were ended. Continue: longfit train --run-dir RUN --resume"
    )
