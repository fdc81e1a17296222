"""What share of loading SmolLM2-135M into NF4 is the quantisation itself: from its GGUF file and from bf16 safetensors.

Part of `kernels_cpu.py`. The clock runs around every call of `quantize_4bit` that the loader makes; calls of several
loader threads are added up, so the share is rather too large than too small.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import longfit
from engine_cpu import dense_folder
from longfit.demo import demo_model
from longfit.kernels import dispatch
from longfit.layers import linear4bit


@dataclass(frozen=True)
class Loading:
    """Seconds of one way to load the model, and how many of them are spent quantising."""

    source: str
    quantise_s: float
    load_s: float

    @property
    def share(self) -> float:
        return self.quantise_s / self.load_s


def loading_rows(repeats: int) -> list[Loading]:
    """Load from both sources in turns, after one turn that does not count; medians of both times."""
    with tempfile.TemporaryDirectory() as parent:
        sources = {"GGUF, 4-bit": demo_model(), "safetensors, bf16": dense_folder(Path(parent))}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
        for turn in range(repeats + 1):
            for name, path in sources.items():
                measured = _load(path)
                if turn:
                    times[name].append(measured)
    return [Loading(name, *(statistics.median(part) for part in zip(*t, strict=True))) for name, t in times.items()]


def _load(path: Path) -> tuple[float, float]:
    spent = 0.0

    def timed(*args: Any, **options: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        result = dispatch.quantize_4bit(*args, **options)
        spent += time.perf_counter() - start
        return result

    with patch.object(linear4bit, "quantize_4bit", timed):
        start = time.perf_counter()
        longfit.load(str(path), quant="nf4", double_quant=True)
        return spent, time.perf_counter() - start
