"""What torch's CUDA attention kernels compute, in plain torch on any device: their layouts, masks and outputs.

Written from their documented behaviour, so that everything around them can be tested without a card: the cutting into
calls, the strides, the log-sum-exp, the running sums. Under `StandIns` a call of the true operator comes here, after
torch has held its arguments against the operator's schema.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _mask(num_queries: int, num_keys: int, left: int, right: int) -> Tensor:
    """Aligned bottom-right: the last query is beside the last key."""
    query, key = torch.arange(num_queries)[:, None] + num_keys - num_queries, torch.arange(num_keys)
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if left >= 0:
        visible &= key >= query - left
    if right >= 0:
        visible &= key <= query + right
    return visible


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[H, t, D], [K, n, D] -> out [H, t, D], lse [H, t]; heads in groups."""
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    scores = (q.double() @ k.double().mT * scale).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v.double(), lse


def _differentiate(grad, q, k, v, out, lse, visible, scale):
    """Gradients from an outside log-sum-exp, as the kernels compute them; query heads are added up."""
    repeats = q.shape[0] // k.shape[0]
    grad, q, out = (x.double() for x in (grad, q, out))
    k, v = (x.double().repeat_interleave(repeats, 0) for x in (k, v))
    weights = (q @ k.mT * scale - lse.double()[..., None]).exp().masked_fill(~visible, 0.0)
    grad_scores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    grad_k, grad_v = grad_scores.mT @ q, weights.mT @ grad
    return grad_scores @ k, *(x.unflatten(0, (-1, repeats)).sum(1) for x in (grad_k, grad_v))


def _segments(query_bounds: Tensor, key_bounds: Tensor) -> Iterator[tuple[slice, slice]]:
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    bounds = list(zip(query_bounds.tolist(), key_bounds.tolist(), strict=True))
    for (a, c), (b, d) in pairwise(bounds):
        yield slice(a, b), slice(c, d)


def _checked(q, k, query_bounds, key_bounds, max_q, max_k, left, right, causal) -> None:
    assert q.dim() == k.dim() == 3
    assert q.stride(-1) == k.stride(-1) == 1
    assert query_bounds[-1] == q.shape[0]
    assert key_bounds[-1] == k.shape[0]
    assert max_q == query_bounds.diff().max()
    assert max_k == key_bounds.diff().max()
    assert causal == (right == 0)
    assert left >= -1


def flash_forward(q, k, v, query_bounds, key_bounds, max_q, max_k, dropout, causal, debug, *, scale, **window):
    """``aten::_flash_attention_forward`` on packed sequences."""
    left, right = window["window_size_left"], window["window_size_right"]
    _checked(q, k, query_bounds, key_bounds, max_q, max_k, left, right, causal)
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], q.shape[0]), torch.nan)
    for here, there in _segments(query_bounds, key_bounds):
        visible = _mask(here.stop - here.start, there.stop - there.start, left, right)
        part, part_lse = _attend(*(x.transpose(0, 1) for x in (q[here], k[there], v[there])), visible, scale)
        out[here], lse[:, here] = part.transpose(0, 1).to(q.dtype), part_lse.float()
    return out, lse, *(torch.empty(0) for _ in range(3))


def flash_backward(
    grad, q, k, v, out, lse, query_bounds, key_bounds, max_q, max_k, dropout, causal, seed, unused, *, scale, **window
):
    """``aten::_flash_attention_backward`` on packed sequences."""
    left, right = window["window_size_left"], window["window_size_right"]
    _checked(q, k, query_bounds, key_bounds, max_q, max_k, left, right, causal)
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[1], q.shape[0])
    results = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    for here, there in _segments(query_bounds, key_bounds):
        visible = _mask(here.stop - here.start, there.stop - there.start, left, right)
        parts = _differentiate(
            *(x.transpose(0, 1) for x in (grad[here], q[here], k[there], v[there], out[here])),
            lse[:, here],
            visible,
            scale,
        )
        for result, where, part in zip(results, (here, there, there), parts, strict=True):
            result[where] = part.transpose(0, 1).to(q.dtype)
    return tuple(results)


def efficient_forward(q, k, v, bias, bounds_q, bounds_k, max_q, max_k, dropout, mask, compute_log_sumexp, *, scale):
    """``aten::_efficient_attention_forward`` on one sequence."""
    assert q.dim() == 4
    assert q.shape[:1] + q.shape[2:3] == k.shape[:1] + k.shape[2:3] == (1, k.shape[2]), "it knows no groups of heads"
    visible = _mask(q.shape[1], k.shape[1], -1, {0: -1, 2: 0}[mask])
    out, lse = _attend(*(x[0].transpose(0, 1) for x in (q, k, v)), visible, scale)
    filled = torch.full((1, q.shape[2], -(-q.shape[1] // 32) * 32), torch.inf)
    filled[0, :, : q.shape[1]] = lse.float()
    return out.transpose(0, 1)[None].to(q.dtype), filled, torch.empty(()), torch.empty(()), q.shape[1], k.shape[1]


def efficient_backward(
    grad, q, k, v, bias, out, bounds_q, bounds_k, max_q, max_k, lse, dropout, seed, offset, mask, bias_grad, *, scale
):
    """``aten::_efficient_attention_backward`` on one sequence."""
    assert (max_q, max_k) == (q.shape[1], k.shape[1])
    assert lse.shape == (1, q.shape[2], -(-max_q // 32) * 32)
    assert q.shape[2] == k.shape[2], "it knows no groups of heads"
    visible = _mask(max_q, max_k, -1, {0: -1, 2: 0}[mask])
    parts = _differentiate(*(x[0].transpose(0, 1) for x in (grad, q, k, v, out)), lse[0, :, :max_q], visible, scale)
    return *(part.transpose(0, 1)[None].to(q.dtype) for part in parts), torch.empty(0)


class StandIns(TorchDispatchMode):
    """Runs the functions of this file in place of the kernels; counts the query heads of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads: list[int] = []
        self.functions: dict[Any, Callable[..., Any]] = {
            torch.ops.aten._flash_attention_forward.default: flash_forward,
            torch.ops.aten._flash_attention_backward.default: flash_backward,
            torch.ops.aten._efficient_attention_forward.default: efficient_forward,
            torch.ops.aten._efficient_attention_backward.default: efficient_backward,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = self.functions.get(func)
        if function is None:
            return func(*args, **(kwargs or {}))
        self.num_heads.append(args[0].shape[-2])
        return function(*args, **kwargs)
