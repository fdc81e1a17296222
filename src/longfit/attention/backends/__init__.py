"""Attention of a tile of queries over all earlier keys, by whichever backend takes the call.

    tile_forward     out and log-sum-exp of the queries [start, start + t)
    tile_backward    their gradients from that log-sum-exp; those of keys and values are added to running sums

What a query may see is a ``Schedule``. How it is computed is a backend: the first row of ``BACKENDS`` that supports the
call, or the one that is forced by name. Every backend computes the same attention; they differ in speed and range.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from longfit.attention.backends import cpp, reference, torch_cpu, torch_efficient, torch_flash
from longfit.attention.tile import Tile, describe
from longfit.attention.visibility import Schedule
from longfit.errors import BackendError


@dataclass(frozen=True)
class Backend:
    """One way to compute tile attention.

    Attributes:
        name: what a caller forces it by.
        supports: ``(q, k, v, softcap=...)`` -> None, or the reason why it cannot take the call.
        forward: ``(tile)`` -> out and log-sum-exp, as ``tile_forward``.
        backward: ``(tile, grad_out, out, lse, grad_k=..., grad_v=...)`` -> grad_q, as ``tile_backward``.
    """

    name: str
    supports: Callable[..., str | None]
    forward: Callable[[Tile], tuple[Tensor, Tensor]]
    backward: Callable[..., Tensor]


BACKENDS = (
    Backend("flash", torch_flash.supports, torch_flash.forward, torch_flash.backward),
    Backend("efficient", torch_efficient.supports, torch_efficient.forward, torch_efficient.backward),
    Backend("cpu", cpp.supports, cpp.forward, cpp.backward),
    Backend("aten", torch_cpu.supports, torch_cpu.forward, torch_cpu.backward),
    Backend("reference", reference.supports, reference.forward, reference.backward),
)
"""In the order of preference; the last takes everything."""


def choose_backend(
    q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None = None, name: str | None = None
) -> Backend:
    """Take the first backend that supports a call, or the one named.

    Args:
        q, k, v: as in ``tile_forward``; only shape, dtype and device are looked at.
        softcap: as in ``tile_forward``.
        name: of a backend; None lets the table decide.
    Raises: BackendError: ``name`` is unknown, or that backend does not support the call.
    """
    if name is None:
        return next(backend for backend in BACKENDS if backend.supports(q, k, v, softcap=softcap) is None)
    for backend in BACKENDS:
        if backend.name == name:
            reason = backend.supports(q, k, v, softcap=softcap)
            if reason is not None:
                raise BackendError(f"attention backend {name!r}: {reason}; let longfit choose, or force another")
            return backend
    known = ", ".join(backend.name for backend in BACKENDS)
    raise BackendError(f"attention backend {name!r}: unknown; allowed are {known}")


def tile_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: Schedule,
    *,
    start: int,
    scaling: float,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from a tile of queries to the keys its schedule shows.

    Args:
        q: ``[B, H, t, D]``, tokens ``[start, start + t)``; any float dtype, any strides.
        k, v: ``[B, K, n, D]``, tokens ``[0, n)`` with ``n >= start + t``; H a multiple of K.
        schedule: of the whole sequence.
        start: first token of the tile.
        scaling: of the scores.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma-2); None is off.
        backend: forces one by name.
    Returns: out ``[B, H, t, D]`` in the dtype of ``q``, stored as ``[B, t, H, D]``; natural log-sum-exp of the scores,
        float32 (float64 for float64) ``[B, H, t]``.
    Raises: ValueError: shapes, dtypes or devices do not fit each other. BackendError: as ``choose_backend``.
    """
    tile = Tile(q, k, v, schedule, start, scaling, softcap)
    return choose_backend(q, k, v, softcap=softcap, name=backend).forward(tile)


def tile_backward(
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
    softcap: float | None = None,
    grad_k: Tensor,
    grad_v: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Differentiate ``tile_forward``.

    Args:
        grad_out: ``[B, H, t, D]``.
        q, k, v, schedule, start, scaling, softcap, backend: those of the forward.
        out, lse: what it returned, by whichever backend.
        grad_k, grad_v: float32 (float64 for float64) ``[B, K, n, D]``; the tile's share is **added in place**.
    Returns: grad_q ``[B, H, t, D]`` in the dtype of ``q``.
    Raises: ValueError: shapes, dtypes or devices do not fit each other. BackendError: as ``choose_backend``.
    """
    tile = Tile(q, k, v, schedule, start, scaling, softcap)
    if grad_k.shape != k.shape or grad_v.shape != v.shape or grad_k.dtype != lse.dtype or grad_v.dtype != lse.dtype:
        raise ValueError(
            f"grad_k {describe(grad_k)}, grad_v {describe(grad_v)}: must have the shapes of k {list(k.shape)} and"
            f" v {list(v.shape)} in {lse.dtype}"
        )
    chosen = choose_backend(q, k, v, softcap=softcap, name=backend)
    return chosen.backward(tile, grad_out, out, lse, grad_k=grad_k, grad_v=grad_v)
