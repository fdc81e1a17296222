"""Run a function in several processes that talk through gloo: forks of this one, so that nothing is imported again."""

import io
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 300
"""A test that hangs for so long has failed."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def run_in_processes(function: Callable[..., Any], num_processes: int, *args: Any, group: bool = True) -> list[Any]:
    """Call ``function(rank, *args)`` in forked processes; return what it returned, in the order of ranks.

    Args:
        group: make the default process group first; without it only torchrun's variables are set.
    Raises: AssertionError: one raised or hangs; its traceback is in the message.
    """
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_work, args=(queue, function, rank, num_processes, port, Path(folder), group, args))
            for rank in range(num_processes)
        ]
        for process in processes:
            process.start()
        try:
            results = dict(queue.get(timeout=TIMEOUT_S) for _ in processes)
        finally:
            for process in processes:
                process.join(timeout=5)
                process.kill()
    problems = [text for ok, text in results.values() if not ok]
    assert not problems, "\n".join(problems)
    # As bytes: a tensor in a queue is memory shared with a process that has gone by now.
    return [torch.load(io.BytesIO(results[rank][1]), weights_only=False) for rank in range(num_processes)]


def _work(
    queue: Any,
    function: Callable[..., Any],
    rank: int,
    num_processes: int,
    port: int,
    folder: Path,
    group: bool,
    args: tuple[Any, ...],
) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier test has left in this process's parent
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_processes), LOCAL_WORLD_SIZE=str(num_processes),
        MASTER_ADDR="localhost", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        if group:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_processes,
                timeout=timedelta(seconds=TIMEOUT_S),
            )  # fmt: skip
        buffer = io.BytesIO()
        torch.save(function(rank, *args), buffer)
        queue.put((rank, (True, buffer.getvalue())))
    except BaseException:
        queue.put((rank, (False, f"process {rank}: {traceback.format_exc()}")))
    queue.close()
    queue.join_thread()
    os._exit(0)  # without the parent's exit handlers
