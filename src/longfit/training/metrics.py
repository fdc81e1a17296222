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


@dataclass(frozen=True)
class Event:
    """Something a watcher of a run may want to show: its kind, a sentence, and the numbers in it."""

    kind: Literal["phase", "warning", "step", "eval", "checkpoint"]
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
        """Add one line and hand it to the operating system."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=True) + "\n")

    def keep_until(self, step: int) -> None:
        """Drop lines after ``step``, which a resumed run will write again, and a torn last line."""
        kept = [record for record in read_metrics(self.path) if int(str(record["step"])) <= step]
        rewritten = self.path.with_suffix(".rewritten")
        rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        rewritten.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, object]]:
    """Read ``metrics.jsonl``; a torn last line, left by a killed process, is skipped.

    Raises: json.JSONDecodeError: another line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # what follows the last line break is torn or empty


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: allocated on a CUDA device, resident (RSS) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        # Not getrusage: its maximum is inherited from the parent through fork and exec.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import psutil  # type: ignore[import-untyped]

    usage = psutil.Process().memory_info()
    return int(usage.peak_wset if sys.platform == "win32" else usage.rss)
