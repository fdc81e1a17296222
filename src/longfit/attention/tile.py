"""A tile of queries, the keys up to it and what it may see: the question that every attention backend answers."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longfit.attention.visibility import Schedule


@dataclass(frozen=True, eq=False)
class QueryTile:
    """A tile of queries, the keys up to it and what they may see, checked.

    Attributes:
        q: ``[B, H, t, D]``, tokens ``[start, start + t)``; any float dtype, any strides.
        k, v: ``[B, K, n, D]``, tokens ``[0, n)`` with ``n >= start + t``; H a multiple of K.
        schedule: of the whole sequence.
        start: first token of the tile.
        scaling: of the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``; None is off.
        sinks: ``[H]``, one more logit a head in the softmax, whose value is zero (gpt-oss); None is off. Backends know
            nothing of them: ``backends.tile_forward`` adds them to what a backend returns.

    Raises: ValueError: shapes, dtypes or devices do not fit each other.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    schedule: Schedule
    start: int
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        q, k, v, schedule = self.q, self.k, self.v, self.schedule
        shapes = f"q {describe(q)}, k {describe(k)}, v {describe(v)}"
        if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
            raise ValueError(f"{shapes}: must be [B, H, t, D], [B, K, n, D] and [B, K, n, D of values]")
        if q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:
            raise ValueError(f"{shapes}: batches must agree and query heads be a multiple of key/value heads")
        if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
            raise ValueError(f"{shapes}: must have one dtype and one device; cast them, or run under torch.autocast")
        if self.start < 0 or k.shape[2] < self.end or schedule.num_tokens < self.end:
            raise ValueError(
                f"queries [{self.start}, {self.end}) over {k.shape[2]} keys and a schedule of {schedule.num_tokens}"
                f" tokens: both must cover the last query"
            )
        if schedule.num_heads != q.shape[1] or schedule.first_key.shape[1] != q.shape[0]:
            raise ValueError(
                f"schedule of {schedule.first_key.shape[1]} rows and {schedule.num_heads} heads does not fit {shapes}"
            )

    @property
    def end(self) -> int:
        """The token after the last query."""
        return self.start + self.q.shape[2]

    @property
    def repeats(self) -> int:
        """Query heads that share a key/value head, H / K."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of log-sum-exps and of running sums: float32, or float64 for float64."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def first_key(self) -> Tensor:
        """The first key that each query sees: int32 ``[C, B, t]``, on the device of the schedule."""
        return self.schedule.tile(self.start, self.q.shape[2])

    def empty_results(self) -> tuple[Tensor, Tensor]:
        """Room for out ``[B, H, t, D of values]``, stored as ``[B, t, H, D]``, and for log-sum-exps ``[B, H, t]``."""
        batch, num_heads, num_queries, _ = self.q.shape
        out = self.q.new_empty(batch, num_queries, num_heads, self.v.shape[-1]).transpose(1, 2)
        return out, self.q.new_empty(batch, num_heads, num_queries, dtype=self.sum_dtype)

    def rows_contiguous(self) -> "QueryTile":
        """The same tile, each of its rows in one piece of memory, as fast kernels read them."""
        q, k, v = (rows_contiguous(x) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)


def rows_contiguous(x: Tensor) -> Tensor:
    """``x``, or a copy of it if its last axis is not the one that is dense in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def describe(x: Tensor) -> str:
    """Shape, dtype and device, as errors name them."""
    return f"{list(x.shape)} {x.dtype} on {x.device}"
