"""Tile attention by the C++ kernels: float32, bf16 and fp16, for any schedule.

Which keys are visible is read by the kernel itself, row by row; nothing is cut into calls here.
"""

from torch import Tensor

from longfit.attention.tile import QueryTile
from longfit.kernels.cpu import attention as cpu_attention
from longfit.kernels.cpu.library import DTYPES


def forward(tile: QueryTile) -> tuple[Tensor, Tensor]:
    """See ``backends.tile_forward``."""
    return cpu_attention.attention_forward(
        tile.q, tile.k, tile.v, tile.first_key(), tile.schedule.head_bounds, start=tile.start, scaling=tile.scaling
    )


def backward(tile: QueryTile, grad_out: Tensor, out: Tensor, lse: Tensor, *, grad_k: Tensor, grad_v: Tensor) -> Tensor:
    """See ``backends.tile_backward``."""
    return cpu_attention.attention_backward(
        grad_out, tile.q, tile.k, tile.v, out, lse, tile.first_key(), tile.schedule.head_bounds,
        start=tile.start, scaling=tile.scaling, grad_k=grad_k, grad_v=grad_v,
    )  # fmt: skip


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why the kernels cannot take this call; None when they can."""
    if q.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {q.device.type}"
    if q.dtype not in DTYPES:
        return f"it takes {', '.join(map(str, DTYPES))}, the tensors are in {q.dtype}"
    if v.shape[-1] != q.shape[-1]:
        return f"values of {v.shape[-1]} dimensions must be as wide as queries, {q.shape[-1]}"
    return cpu_attention.supported()
