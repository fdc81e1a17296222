"""Machines: accelerators by name, what this one has, its measured rates, and seconds a step from them.

Sizes of accelerators are what their driver reports, a little below what is printed on the box. Rates are never
guessed: without a measurement (``longfit doctor --measure``) a plan has no time.
"""

import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longfit.errors import ConfigError
from longfit.files.reading import read_object
from longfit.files.writing import write_text
from longfit.kernels.cpu import processor
from longfit.notice import notify
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import ModelShape

GIB = 2**30
GPUS = {
    **{"t4": 14.6, "3060": 11.8, "v100-16": 15.8, "v100-32": 31.7, "l4": 22.0, "a10": 22.0, "3090": 23.6},
    **{"4090": 23.5, "5090": 31.4, "a100-40": 39.4, "l40s": 44.4, "a6000": 47.5, "a100-80": 79.1, "h100": 79.1},
    **{"h200": 139.7},
}
"""GiB of memory by short name."""


def gpu_bytes(name: str) -> int:
    """Return the memory of an accelerator.

    Raises: ConfigError: the name is unknown.
    """
    found = GPUS.get(name.strip().lower())
    if found is None:
        raise ConfigError(
            f"--gpus {name}: unknown; allowed are {', '.join(GPUS)}; or give its memory with --vram 24GiB"
        )
    return int(found * GIB)


def this_host_bytes() -> int:
    """Bytes of host memory that could be had now."""
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)


def this_gpu_bytes() -> int | None:
    """Total bytes of the first NVIDIA accelerator, asked of its driver; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    words = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=20)
    first = answer.stdout.strip().splitlines()[:1]
    return int(first[0]) << 20 if answer.returncode == 0 and first and first[0].isdigit() else None


def fused_kernels_here() -> bool:
    """Whether this machine's CPU and this installation have the kernels that ``PlanSettings.fused_kernels`` means."""
    return processor.has_kernels()


# ------------------------------------------------------------------------------------------------ rates and time
@dataclass(frozen=True)
class Rates:
    """What a machine was measured to do.

    Attributes:
        device: "cuda" or "cpu".
        name: of the accelerator or processor.
        dtype: that the products and the attention were measured in.
        matmul_flops: floating-point operations a second of a large matrix product.
        attention_flops: of causal attention, forward and backward together.
        copy_bytes: bytes a second between the accelerator and host memory; on a CPU, of a memory copy.
        disk_bytes: bytes a second written to the disk of the measuring directory.
    """

    device: str
    name: str
    matmul_flops: float
    attention_flops: float
    copy_bytes: float
    disk_bytes: float
    dtype: str = "bfloat16"


FASTEST = 1e24
"""Operations or bytes a second; a million times what the fastest machine does. JSON knows numbers beyond any float."""


def rates_file() -> Path:
    """Where measured rates are kept: ``$LONGFIT_CACHE`` or the user's cache folder."""
    folder = (
        os.environ.get("LONGFIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "longfit"
    )
    return Path(folder) / "rates.json"


def save_rates(rates: Rates) -> Path:
    """Keep the rates of a device, beside those of others; returns the file."""
    path = rates_file()
    known = _read_all(path)
    known[rates.device] = asdict(rates)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(known, indent=1) + "\n")
    return path


def read_rates(device: str) -> Rates | None:
    """Return the measured rates of this machine's device; None if they were never measured, or cannot be read.

    Without them a plan has no time, and nothing else changes: no run is refused for them.
    """
    found = _read_all(rates_file()).get(device)
    try:
        rates = Rates(**found)  # type: ignore[arg-type]  # TypeError: none, or not those of this version
    except TypeError:
        return None
    speeds = (rates.matmul_flops, rates.attention_flops, rates.copy_bytes, rates.disk_bytes)
    return rates if all(isinstance(speed, int | float) and 0 < speed < FASTEST for speed in speeds) else None


def _read_all(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, ConfigError, what="the measured rates", do="delete it")
    except ConfigError as error:
        if path.exists():
            notify(f"{error}; until longfit doctor --measure has measured them anew, plans have no time")
        return {}


def step_flops(shape: ModelShape, settings: PlanSettings) -> tuple[float, float]:
    """Operations of one optimiser step: of matrix products, and of attention.

    A frozen weight multiplies three times (forward, recomputed forward, gradient of its input). Attention multiplies
    twice in forward and five times in backward for each pair of a query and a key that it sees; forward runs twice.
    """
    tokens = settings.context * settings.batch_size * settings.gradient_accumulation
    matrices = sum(kind.count * m.count * (m.numel + settings.rank * (m.in_features + m.out_features))
                   for kind in shape.layer_kinds for m in kind.matrices)  # fmt: skip
    experts = ((kind.count, kind.experts) for kind in shape.layer_kinds if kind.experts is not None)
    matrices += sum(count * each.rows * (each.numel // each.count) for count, each in experts)
    head = 2 * shape.vocab_size * shape.hidden_size
    linear = 6.0 * matrices * tokens + 2.0 * head * tokens
    pairs = sum(_seen_pairs(settings, window) for window in shape.windows)
    windows = settings.batch_size * settings.gradient_accumulation
    return linear, 2.0 * 9 * pairs * shape.query_width * windows


def _seen_pairs(settings: PlanSettings, window: int | None) -> float:
    """Pairs of a query and a key it sees, in one window of text."""
    group = None if window is not None else settings.effective_group_size
    seen = min(settings.context, window or group or settings.context)
    if window is not None:
        return seen * (settings.context - seen / 2)
    return settings.context * seen / 2


def step_seconds(shape: ModelShape, settings: PlanSettings, rates: Rates) -> tuple[float, float]:
    """Seconds of a step, from measured rates: copies all hidden and full rates, to nothing hidden and half rates."""
    linear, attention = step_flops(shape, settings)
    computing = linear / rates.matmul_flops + attention / rates.attention_flops
    inputs = 2.0 * shape.num_layers * settings.context * settings.batch_size * settings.gradient_accumulation
    inputs *= shape.hidden_size * settings.element_bytes
    speed = {"device": None, "ram": rates.copy_bytes, "pinned": rates.copy_bytes, "file": rates.disk_bytes}[
        settings.offload
    ]
    copying = 0.0 if speed is None or settings.aliases else inputs / speed
    return max(computing, copying), 2 * computing + copying
