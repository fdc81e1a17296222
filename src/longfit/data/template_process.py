"""Asks the process in which chat templates run (`rendering.py`), and ends it when it takes too long or too much.

One such process serves all templates of this one. It is started when the first chat is rendered, costs a tenth of a
millisecond a rendering, and ends with this process, however that ends: its input is then at an end.
"""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from functools import cache
from typing import Any

from longfit.data.rendering import FRAME, MEMORY_BYTES

LIMIT_S = 20.0
"""Of a processor, for one rendering: a chat of a million tokens takes a hundredth of it, on a busy machine too."""
STUCK_TIMES = 15
"""So many times the limit may pass on the clock: the machine is busy, or the process was stopped."""
LOOK_EVERY_S = 0.25


class TemplateProcess:
    """The process, from the first rendering on; a new one after a fork, and after one that had to be killed."""

    def __init__(self, *, limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._began: float | None = None
        self._killed_for = ""

    def render(self, source: str, *, date: datetime | None, variables: dict[str, Any]) -> dict[str, Any]:
        """Render a template.

        Returns: text and spans; or why not: refused or syntax with a line, grows, memory, slow.
        """
        request = pickle.dumps({"source": source, "date": date, "variables": variables})
        if self._owner != os.getpid():  # forked: the process belongs to the parent, and so may the lock
            self._lock, self._process, self._owner = threading.Lock(), None, os.getpid()
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            self._began, self._killed_for = time.monotonic(), ""
            try:
                process.stdin.write(FRAME.pack(len(request)) + request)
                process.stdin.flush()
                head = process.stdout.read(FRAME.size)
                reply = process.stdout.read(FRAME.unpack(head)[0]) if len(head) == FRAME.size else b""
            except OSError:  # it has gone
                reply = b""
            except BaseException:  # Ctrl-C: what it would still answer belongs to nobody
                self._end()
                raise
            finally:
                self._began = None
            if not reply:
                self._end()
                return {self._killed_for or "memory": True}  # the kernel, too, ends what takes too much
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "longfit.data.rendering"],  # -P: nothing from the current folder
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill the process when a rendering takes too long, or too much memory (where no limit of the system holds)."""
        import psutil  # type: ignore[import-untyped]

        with suppress(psutil.Error):
            looked_at = psutil.Process(process.pid)
            seen, used_s = None, 0.0
            while process.poll() is None:
                time.sleep(LOOK_EVERY_S)
                began = self._began
                if began is None:
                    continue
                times = looked_at.cpu_times()
                if began != seen:
                    seen, used_s = began, times.user + times.system
                passed_s = time.monotonic() - began
                if times.user + times.system - used_s > self.limit_s or passed_s > STUCK_TIMES * self.limit_s:
                    self._killed_for = "slow"
                elif looked_at.memory_info().rss > MEMORY_BYTES:
                    self._killed_for = "memory"
                else:
                    continue
                process.kill()


@cache
def template_process() -> TemplateProcess:
    """The one of this process: to start another for each template would cost a fifth of a second each."""
    return TemplateProcess()
