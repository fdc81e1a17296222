"""What a run writes down while it trains: `metrics.jsonl`, one JSON object a line, and events for whoever watches.

The file is the truth: every viewer, tracker and report reads it. A line is written whole and flushed at once, so that a
killed run leaves at most one torn line at the end, which readers skip and a resumed run removes.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from longfit.engine.host_memory import peak_bytes
from longfit.errors import RunError
from longfit.files.reading import reading, require_regular
from longfit.files.writing import append_lines, write_text, writing


@dataclass(frozen=True)
class Event:
    """Something a watcher of a run may want to show: its kind, a sentence, and the numbers in it."""

    kind: Literal["phase", "warning", "count", "step", "eval", "checkpoint"]
    text: str
    values: Mapping[str, object] = field(default_factory=dict)


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Watch nothing."""


class MetricsFile:
    """The append-only ``metrics.jsonl`` of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, object]) -> None:
        """Add one line and hand it to the operating system.

        Raises: RunError: it cannot be written; the lines before it stay whole.
        """
        append_lines(self.path, json.dumps(record, allow_nan=True) + "\n")

    def restore(self, saved: Path | None) -> bool:
        """Go back to the metrics that belong to a checkpoint; later lines will be written again.

        Args:
            saved: the checkpoint's copy; None: those of a run that starts from the beginning.
        Returns: False if the file had not all of these lines, because somebody removed or changed it.
        Raises: RunError: it cannot be written.
        """
        text = b"" if saved is None else saved.read_bytes()
        with writing(self.path):
            is_there = self.path.is_file()  # a device or a pipe in its place is replaced unread
            had = self.path.read_bytes().startswith(text) if is_there else not (text or self.path.exists())
            write_text(self.path, text.decode())
        return had


def read_metrics(path: Path) -> list[dict[str, object]]:
    """Read ``metrics.jsonl``; a torn last line, left by a killed process, is skipped.

    Raises: RunError: another line is damaged.
    """
    if not path.exists() and not path.is_symlink():
        return []
    require_regular(path, RunError)
    with reading(path, "the run's metrics", RunError, do="resume the run, which restores them from its checkpoint"):
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines[:-1] if line]  # what follows the last line break is torn or empty
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise RunError(f"{path}: line {number} is damaged; resume the run, which restores its metrics")
        return records


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: allocated on a CUDA device, resident (RSS) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return peak_bytes()
    import psutil  # type: ignore[import-untyped]

    usage = psutil.Process().memory_info()
    return int(usage.peak_wset if sys.platform == "win32" else usage.rss)
