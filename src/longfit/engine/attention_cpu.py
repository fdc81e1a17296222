"""Tile attention by the C++ kernels: bf16 on processors with AVX-512 BF16, for any schedule.

Which keys are visible is read by the kernel itself, row by row; nothing is cut into calls here.
"""

import torch
from torch import Tensor

from longfit.engine.schedule import Schedule
from longfit.kernels import cpu_attention


def forward(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, *, start: int, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """See ``attention.tile_forward``."""
    assert softcap is None
    first_key = schedule.tile(start, q.shape[2])
    return cpu_attention.attention_forward(q, k, v, first_key, schedule.head_bounds, start=start, scaling=scaling)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: Schedule,
    *,
    start: int,
    scaling: float,
    softcap: float | None,
    grad_k: Tensor,
    grad_v: Tensor,
) -> Tensor:
    """See ``attention.tile_backward``."""
    assert softcap is None
    return cpu_attention.attention_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        schedule.tile(start, q.shape[2]),
        schedule.head_bounds,
        start=start,
        scaling=scaling,
        grad_k=grad_k,
        grad_v=grad_v,
    )


def supports(q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None) -> str | None:
    """Say why the kernels cannot take this call; None when they can."""
    if q.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {q.device.type}"
    if q.dtype != torch.bfloat16:
        return f"it computes in torch.bfloat16, the tensors are in {q.dtype}"
    if softcap is not None:
        return "it has no soft cap"
    if v.shape[-1] != q.shape[-1]:
        return f"values of {v.shape[-1]} dimensions must be as wide as queries, {q.shape[-1]}"
    return cpu_attention.supported()
