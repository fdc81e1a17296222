"""End a run whose processes do not move any more, and say which and where.

A process that ends is noticed by its agent and by whoever talks to it. One that freezes, or waits for what will never
come, is noticed by nobody: the others wait for it, each in some exchange, for as long as the exchange allows. And that
cannot be short, for waiting is normal where one process has a longer window than another.

So each process says every few seconds that it is there, and how much processor time its main thread has used; waiting
uses none. A process that says nothing for ``timeout`` is frozen or gone. When no process of the run has worked for
``timeout``, all of them wait for each other, or for one that waits for something else. In both cases every process
that can leaves the reason and ends.

Not noticed: a process that computes for ever. On CUDA, where waiting may keep the processor busy, an exchange that
never ends is ended by NCCL's own watch, after the time-out of the process group.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from longfit.errors import ProcessesError

BEATS = 10
"""Beats within a time-out: enough that one which comes late is not taken for silence."""

WORKING = 0.005
"""Share of the time between two beats that a working main thread is on the processor at least. A waiting one is at 0;
one that leads other threads through a product is near 1, one that feeds a card far above a hundredth."""


class Store(Protocol):
    """The part of torch.distributed's store that is used."""

    def set(self, key: str, value: str) -> None:
        """Keep a text under a key."""
        ...

    def get(self, key: str) -> bytes:
        """Return what is kept."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        ...


@dataclass
class _Heard:
    """The last beat of a process, and when (on our clock) it was new and when it had worked."""

    beat: int
    new_at: float
    worked_at: float
    about: dict[str, object]


def processor_time() -> Callable[[], float]:
    """Return a clock of the calling thread's processor time that other threads may read; elsewhere, of the process."""
    if hasattr(time, "pthread_getcpuclockid"):
        clock = time.pthread_getcpuclockid(threading.get_ident())
        return lambda: time.clock_gettime(clock)
    return time.process_time


class Heartbeat:
    """Beats and listens in a thread of its own, from ``start`` to ``stop``; made by the thread that it watches."""

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        num_processes: int,
        timeout: float,
        end: Callable[[ProcessesError], None],
        remove: Callable[[int], None] | None = None,
    ) -> None:
        """Watch the calling thread.

        Args:
            store: reached by all processes, and used by this thread alone.
            timeout: seconds after which silence or idleness ends the run.
            end: called once, in the thread that listens; ends this process.
            remove: called before it with the pid of each silent process of this machine: it cannot end by itself.
        """
        self._store, self._rank, self._num_processes, self._end = store, rank, num_processes, end
        self._remove = remove
        self._timeout, self._period = timeout, timeout / BEATS
        self._main, self._processor_time = threading.get_ident(), processor_time()
        self._patience = 0
        self._stopped = threading.Event()
        self._heard: dict[int, _Heard] = {}
        self._thread = threading.Thread(target=self._run, name="longfit-heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat and to listen."""
        self._thread.start()

    def stop(self) -> None:
        """Say that this process is done, and listen no more."""
        self._stopped.set()
        self._thread.join()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Count as working whatever happens inside: a slow disk is no fault."""
        self._patience += 1
        try:
            yield
        finally:
            self._patience -= 1

    def _run(self) -> None:
        beat, used, at = 0, self._processor_time(), time.monotonic()
        while not self._stopped.wait(self._period):
            now, now_used = time.monotonic(), self._processor_time()
            worked = self._patience > 0 or now_used - used > WORKING * (now - at)
            beat, used, at = beat + 1, now_used, now
            try:
                self._say(beat, worked=worked)
                reason = self._listen(now)
            except RuntimeError as error:  # torch raises DistStoreError, DistNetworkError, ...
                if self._stopped.is_set():
                    return
                reason = f"the store of the run does not answer ({str(error).splitlines()[0]}): its process has gone"
            if reason is not None:
                self._remove_silent(time.monotonic())
                self._end(ProcessesError(reason))
                return
        self._say(beat + 1, worked=True, done=True)

    def _say(self, beat: int, *, worked: bool, done: bool = False) -> None:
        about = {"beat": beat, "worked": worked, "done": done, "host": socket.gethostname(), "pid": os.getpid()}
        frame = sys._current_frames().get(self._main)
        try:
            self._store.set(self._key(self._rank), json.dumps({**about, "where": where(frame)}))
        except RuntimeError:
            if not done:  # at the end the store may have gone before us
                raise

    def _listen(self, now: float) -> str | None:
        """Return why the run must end; None while all is well."""
        for rank in range(self._num_processes):
            key = self._key(rank)
            about = json.loads(self._store.get(key)) if self._store.check([key]) else {"beat": 0, "worked": True}
            heard = self._heard.get(rank)
            if heard is None:
                self._heard[rank] = _Heard(about["beat"], now, now, about)
            elif heard.beat != about["beat"]:
                self._heard[rank] = _Heard(about["beat"], now, now if about["worked"] else heard.worked_at, about)
        return self._verdict(now)

    def _verdict(self, now: float) -> str | None:
        limit = self._timeout - 2 * self._period
        going = {rank: heard for rank, heard in self._heard.items() if not heard.about.get("done")}
        silent = self._silent(now)
        continued = "continue with longfit train --run-dir RUN --resume"
        advice = f"(parallel.timeout is {self._timeout:g} s); the run has ended; {continued}"
        if silent:
            lines = [f"{self._name(rank)}: frozen or gone, last {_place(heard)}" for rank, heard in silent.items()]
            return f"not heard of for {now - min(h.new_at for h in silent.values()):.0f} s: {'; '.join(lines)} {advice}"
        if going and all(now - heard.worked_at > limit for heard in going.values()):
            lines = [f"{self._name(rank)} {_place(heard)}" for rank, heard in going.items()]
            idle = now - max(heard.worked_at for heard in going.values())
            return f"no process has worked for {idle:.0f} s, they wait for each other: {'; '.join(lines)} {advice}"
        return None

    def _silent(self, now: float) -> dict[int, _Heard]:
        limit = self._timeout - 2 * self._period
        return {
            rank: heard
            for rank, heard in self._heard.items()
            if now - heard.new_at > limit and not heard.about.get("done")
        }

    def _remove_silent(self, now: float) -> None:
        for heard in self._silent(now).values():
            pid = heard.about.get("pid")
            if self._remove is not None and isinstance(pid, int) and heard.about.get("host") == socket.gethostname():
                self._remove(pid)

    def _name(self, rank: int) -> str:
        about = self._heard[rank].about
        here = f" ({about['host']}, pid {about['pid']})" if "pid" in about else ""
        return f"process {rank} of {self._num_processes}{here}"

    @staticmethod
    def _key(rank: int) -> str:
        return f"longfit/heartbeat/{rank}"


def _place(heard: _Heard) -> str:
    return f"in {heard.about.get('where', 'its start')}"


def where(frame: FrameType | None) -> str:
    """Name the innermost functions of a stack, of longfit and of whatever it has called: ``step > backward > wait``."""
    names: list[str] = []
    while frame is not None:
        names.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return " > ".join(reversed(names[:4]))
