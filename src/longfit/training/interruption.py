"""Ctrl-C, or a closed terminal, in the middle of a step, without losing the run or tearing what must be whole.

Forward and backward change nothing that is saved, so they may be broken off anywhere, even in an hour-long step. Only
the optimiser's step and the writing of files must finish: there a signal waits.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interruptible:
    """While entered, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, at once or, inside `held`, at its end.

    A signal that is ignored stays so: ``nohup`` runs go on when their terminal closes. Outside the main thread, where
    Python allows no signal handlers, it does nothing.

    Args:
        deferred: raise nothing; somebody asks ``requested`` where all processes of the run can stop together.
    """

    SIGNALS = tuple(
        getattr(signal, name)
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
        if hasattr(signal, name)  # SIGHUP: a closed terminal; Windows has SIGBREAK in its place
    )

    def __init__(self, *, deferred: bool = False) -> None:
        self.requested = False
        self._deferred = deferred
        self._depth = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruptible":
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._on_signal) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if (
            first and self._depth == 0 and not self._deferred
        ):  # a second Ctrl-C must not break the saving that the first one began
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let what is inside finish; an interruption that came meanwhile is raised at the end."""
        asked_before = self.requested
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self.requested and not asked_before and self._depth == 0 and not self._deferred:
            raise KeyboardInterrupt
