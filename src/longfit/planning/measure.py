"""Measure what a machine does a second, for the time of a plan: matrix products, attention, copies, the disk.

Shapes are those of a step: a tile of tokens times a layer's matrix; a tile of queries on all keys before it, forward
and backward, by the backend that a run would use. Every rate is the best of a few turns, because a busy moment can only
make it lower. A few seconds in all; the numbers serve a range, not a benchmark.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from longfit.attention.backends import tile_backward, tile_forward
from longfit.attention.visibility import build_schedule, document_starts
from longfit.planning.machines import Rates

TURNS = 3
COPY_BYTES = 64 << 20


def measure_rates(device: torch.device, *, name: str, folder: Path) -> Rates:
    """Measure a device.

    Args:
        device: a CPU or a CUDA device.
        name: of it, for people.
        folder: on the disk to be measured.
    Returns: its rates.
    """
    large = device.type == "cuda"
    return Rates(
        device=device.type,
        name=name,
        matmul_flops=_matmul(device, size=4096 if large else 1024),
        attention_flops=_attention(device, tokens=8192 if large else 2048, heads=32 if large else 9),
        copy_bytes=_copy(device),
        disk_bytes=_disk(folder),
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


def _matmul(device: torch.device, *, size: int) -> float:
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    return 2.0 * size**3 / _best(lambda: left @ right, device)


def _attention(device: torch.device, *, tokens: int, heads: int) -> float:
    """Operations a second over one tile of all tokens: two products in forward, five in backward, half of all pairs."""
    q, k, v, d_out = (
        torch.randn(1, heads, tokens, 64, device=device).to(torch.bfloat16) for _ in range(4)
    )  # [1, H, T, D]
    schedule = build_schedule(heads, document_starts(1, tokens, device=device))
    grad_k, grad_v = (torch.zeros(k.shape, device=device) for _ in range(2))

    def both() -> None:
        out, lse = tile_forward(q, k, v, schedule, start=0, scaling=0.125)
        tile_backward(d_out, q, k, v, out, lse, schedule, start=0, scaling=0.125, grad_k=grad_k, grad_v=grad_v)

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
