"""A table of experiments that grows cell by cell: each result is on disk before the next begins, finished ones stay.

A cell is its settings, a flat dictionary; two cells are the same if their settings are. So a script may be interrupted
at any moment, started again, or given more cells. To measure a cell anew, delete its entry from the file.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import commit, cores_of_processor

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
IMAGES = ROOT / "docs" / "images"

Settings = Mapping[str, Any]


class Cells:
    """The cells of one experiment in one JSON file."""

    def __init__(self, path: Path) -> None:
        """Open the file, or begin it.

        Args:
            path: made with its folder when the first cell is measured.
        """
        self.path = path
        self.records: list[dict[str, Any]] = json.loads(path.read_text())["cells"] if path.exists() else []

    def find(self, settings: Settings) -> dict[str, Any] | None:
        """The result of a cell; None if it was not measured yet."""
        wanted = _as_stored(settings)
        return next((record["result"] for record in self.records if record["settings"] == wanted), None)

    def select(self, **some: Any) -> list[dict[str, Any]]:
        """All records, in the order measured, whose settings agree with those given."""
        wanted = _as_stored(some)
        return [record for record in self.records if wanted.items() <= record["settings"].items()]

    def run(self, cells: Iterable[Settings], measure: Callable[[Settings], dict[str, Any]]) -> None:
        """Measure the cells that are not there yet, in order, and write each at once."""
        todo = [settings for settings in cells if self.find(settings) is None]
        for number, settings in enumerate(todo, start=1):
            print(f"[{number}/{len(todo)}] {describe(settings)}", flush=True)
            began = time.perf_counter()
            result = measure(settings)
            seconds = time.perf_counter() - began
            record = {"settings": _as_stored(settings), "result": result, "seconds": seconds, "commit": commit()}
            self.records.append(record)
            self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps({"machine": machine(), "cells": self.records}, indent=1) + "\n")
        os.replace(beside, self.path)


def describe(settings: Settings) -> str:
    """Settings in one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def machine() -> dict[str, str]:
    """What the numbers depend on besides the code."""
    return {"cpu": cores_of_processor(), **{name: version(name) for name in ("torch", "transformers", "peft")}}


def _as_stored(settings: Settings) -> dict[str, Any]:
    return json.loads(json.dumps(dict(settings)))
