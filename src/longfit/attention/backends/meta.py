"""Attention on the meta device: no numbers, only what a fused kernel allocates.

Bytes of a training step are counted on it, as shapes are elsewhere in torch. A fused kernel allocates its output, one
log-sum-exp a query and head, and for the backward the gradient of the queries and its sum in float32.
"""

import torch
from torch import Tensor

from longfit.attention.tile import QueryTile


def forward(tile: QueryTile) -> tuple[Tensor, Tensor]:
    """Allocate output and log-sum-exp; see ``backends.tile_forward``."""
    return tile.empty_results()


def backward(tile: QueryTile, grad_out: Tensor, out: Tensor, lse: Tensor, *, grad_k: Tensor, grad_v: Tensor) -> Tensor:
    """Allocate the gradient of the queries beside its sum; see ``backends.tile_backward``."""
    summed = torch.empty_like(tile.q, dtype=tile.sum_dtype)
    return summed.to(tile.q.dtype)
