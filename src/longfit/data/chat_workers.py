"""Chats become tokens in several processes at once: templates are rendered by Python, which uses one core a process.

Batches go round the workers and their results come back in the same order, so that the tokens are those of one process.
Each worker has one batch at a time, and waits for the next: no queue grows, and no pipe can be full at both ends.

What this is not: multiprocessing, which would import the user's own script in each worker. A worker is a fresh Python
that imports this file, which needs no torch.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from typing import IO, Any

from longfit.errors import DataError


class _Worker:
    """A process that applies a function, and the pipes to it."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        paths = os.pathsep.join(filter(None, sys.path))
        environment = {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
        code = f"from {__name__} import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],  # -P: nothing from the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.send(function)

    def send(self, value: object) -> None:
        with suppress(BrokenPipeError):  # it has died; `receive` says how
            pickle.dump(value, _pipe(self.process.stdin), protocol=pickle.HIGHEST_PROTOCOL)
            _pipe(self.process.stdin).flush()

    def receive(self) -> Any:
        """Read a result.

        Raises: DataError: the process has died. Whatever the function raised.
        """
        try:
            is_error, value = pickle.load(_pipe(self.process.stdout))
        except (EOFError, pickle.UnpicklingError):
            code = self.process.wait()
            killed = " (killed, as when memory is short)" if code == -9 else ""
            raise DataError(
                f"a process that turned chats into tokens ended with code {code}{killed}; start again, with more "
                "memory free or fewer cores (taskset -c 0,1)"
            ) from None
        if is_error:
            raise value
        return value

    def stop(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                _pipe(pipe).close()
        self.process.kill()
        self.process.wait()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def map_in_order(function: Callable[[Any], Any], batches: Iterable[Any], *, processes: int) -> Iterator[Any]:
    """Apply a function to batches in several processes; yield the results in the order of the batches.

    Args:
        function: it, the batches and the results are pickled.
        processes: at least 1; they end with the iterator.
    Raises: DataError: a process died. Whatever the function raised.
    """
    with ExitStack() as running:
        busy: deque[_Worker] = deque()
        for batch in batches:
            if len(busy) < processes:
                worker = _Worker(function)
                running.callback(worker.stop)
            else:
                worker = busy.popleft()
                yield worker.receive()
            worker.send(batch)
            busy.append(worker)
        for worker in busy:
            yield worker.receive()


def serve() -> None:
    """What a worker does: read the function, then apply it to each batch, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends the workers
    requests, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whoever prints must not write into the results
    function = pickle.load(requests)
    while True:
        try:
            batch = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = (False, function(batch))
        except Exception as error:  # told to the parent, which raises it
            answer = (True, error)
        try:
            pickle.dump(answer, results, protocol=pickle.HIGHEST_PROTOCOL)
            results.flush()
        except BrokenPipeError:  # the parent has ended
            return
