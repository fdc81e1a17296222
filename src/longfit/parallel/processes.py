"""The process group of a run: how long an exchange may take, the store that heartbeats go through, and the last word.

Exchanges have no time-out to speak of: one process may wait for another as long as that works. Whether anybody works
is the heartbeat's question.
"""

import os
import signal
import sys
from contextlib import suppress
from datetime import timedelta

import torch

from longfit.compat.torch_distributed import default_store
from longfit.errors import ProcessesError
from longfit.parallel.heartbeat import Heartbeat
from longfit.parallel.launch import is_started_here, leave_reason

NCCL_TIMEOUT_S = 600
"""torch's own: NCCL's watch is the only one for an exchange that hangs on the card."""


def exchange_timeout(timeout: float, *, on_cpu: bool) -> timedelta:
    """How long one exchange may take, for the process group."""
    return timedelta(days=7) if on_cpu else timedelta(seconds=max(timeout, NCCL_TIMEOUT_S))


def start_heartbeat(*, timeout: float) -> Heartbeat | None:
    """Begin to watch this process and the others; None when it is alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    heartbeat = Heartbeat(
        default_store(),
        rank=torch.distributed.get_rank(),
        num_processes=torch.distributed.get_world_size(),
        timeout=timeout,
        end=_end,
        remove=_kill if is_started_here(os.environ) else None,
    )
    heartbeat.start()
    return heartbeat


def _kill(pid: int) -> None:
    """End a frozen process, which the agent would give half a minute to end by itself."""
    with suppress(OSError):  # it has ended by itself
        os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows ends a process whatever the signal


def _end(error: ProcessesError) -> None:
    """Leave the reason and end at once: the main thread may be where no exception reaches it."""
    if not leave_reason(error):
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
    os._exit(1)
