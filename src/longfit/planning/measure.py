"""Measure what a machine does a second, for the time of a plan: matrix products, attention, copies, the disk.

Shapes are those of a step: a tile of tokens times a layer's matrix; a tile of queries on all keys before it, forward
and backward, by the backend that a run would use. Every rate is the best of a few turns, because a busy moment can only
make it lower. A few seconds in all; the numbers serve a range, not a benchmark.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from longfit.attention.backends import tile_backward, tile_forward
from longfit.attention.tile import QueryTile
from longfit.attention.visibility import build_schedule, document_starts
from longfit.planning.machines import Rates

TURNS = 3
COPY_BYTES = 64 << 20


@dataclass(frozen=True)
class DtypeRates:
    """What a device does a second in one dtype: floating-point operations of a matrix product, and of attention."""

    matmul_flops: float
    attention_flops: float


def measure_dtypes(device: torch.device) -> dict[str, DtypeRates]:
    """Measure each dtype that a run on the device may compute in, by the name that ``model.dtype`` takes."""
    dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if device.type == "cuda" else [])]
    return {
        str(dtype).removeprefix("torch."): DtypeRates(_matmul(device, dtype), measure_attention(device, dtype))
        for dtype in dtypes
    }


def measure_rates(
    device: torch.device, *, name: str, folder: Path, dtype: str, dtypes: Mapping[str, DtypeRates] | None = None
) -> Rates:
    """Measure a device.

    Args:
        device: a CPU or a CUDA device.
        name: of it, for people.
        folder: on the disk to be measured.
        dtype: that a run there would compute in.
        dtypes: what :func:`measure_dtypes` found; measured here by default.
    Returns: its rates.
    """
    computing = (dtypes or measure_dtypes(device))[dtype]
    return Rates(
        device=device.type,
        name=name,
        matmul_flops=computing.matmul_flops,
        attention_flops=computing.attention_flops,
        copy_bytes=_copy(device),
        disk_bytes=_disk(folder),
        dtype=dtype,
    )


def _best(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest turn; the first is not counted."""
    seconds = []
    for _ in range(TURNS + 1):
        _wait(device)
        began = time.perf_counter()
        function()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _best(lambda: left @ right, device)


def measure_attention(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second over one tile of all tokens: two products in forward, five in backward, half of all pairs."""
    tokens, heads = (8192, 32) if device.type == "cuda" else (2048, 9)
    q, k, v, d_out = (torch.randn(1, heads, tokens, 64, device=device).to(dtype) for _ in range(4))  # [1, H, T, D]
    schedule = build_schedule(heads, document_starts(1, tokens, device=device))
    tile = QueryTile(q, k, v, schedule, 0, 0.125)
    grad_k, grad_v = (torch.zeros(k.shape, device=device) for _ in range(2))

    def both() -> None:
        out, lse = tile_forward(tile)
        tile_backward(tile, d_out, out, lse, grad_k=grad_k, grad_v=grad_v)

    return 2.0 * 7 * heads * 64 * tokens**2 / 2 / _best(both, device)


def _copy(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    return COPY_BYTES / _best(lambda: target.copy_(source), device)


def _disk(folder: Path) -> float:
    """Bytes a second written and flushed; reading would come from the page cache."""
    data = os.urandom(1 << 20)

    def write() -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(COPY_BYTES >> 20):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return COPY_BYTES / _best(write, torch.device("cpu"))
