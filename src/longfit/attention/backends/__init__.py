"""Attention of a tile of queries over all earlier keys, by whichever backend takes the call.

    tile_forward     out and log-sum-exp of the queries [start, start + t)
    tile_backward    their gradients from that log-sum-exp; those of keys and values are added to running sums

What a query may see is a ``Schedule``. How it is computed is a backend: the first row of ``BACKENDS`` that supports the
call, or the one that is forced by name or by `use_backend`. Every backend computes the same attention; they differ in
speed and range.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.attention.backends import cpp, meta, reference, torch_cpu, torch_efficient, torch_flash
from longfit.attention.tile import QueryTile, describe
from longfit.errors import BackendError
from longfit.kernels.dispatch import Choice, dispatcher


@dataclass(frozen=True)
class Backend:
    """One way to compute tile attention.

    Attributes:
        name: what a caller forces it by.
        supports: ``(q, k, v)`` -> None, or the reason why it cannot take tensors of this shape, dtype and device.
        forward: ``(tile)`` -> out and log-sum-exp, as ``tile_forward``.
        backward: ``(tile, grad_out, out, lse, grad_k=..., grad_v=...)`` -> grad_q, as ``tile_backward``.
        softcap: whether it computes a soft cap on scores.
    """

    name: str
    supports: Callable[[Tensor, Tensor, Tensor], str | None]
    forward: Callable[[QueryTile], tuple[Tensor, Tensor]]
    backward: Callable[..., Tensor]
    softcap: bool = False

    def why_not(self, q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None = None) -> str | None:
        """Say why it cannot take a call; None when it can."""
        if softcap is not None and not self.softcap:
            return "it has no soft cap"
        return self.supports(q, k, v)


BACKENDS = (
    Backend("flash", torch_flash.supports, torch_flash.forward, torch_flash.backward),
    Backend("efficient", torch_efficient.supports, torch_efficient.forward, torch_efficient.backward),
    Backend("cpu", cpp.supports, cpp.forward, cpp.backward),
    Backend("aten", torch_cpu.supports, torch_cpu.forward, torch_cpu.backward),
    Backend("reference", reference.supports, reference.forward, reference.backward, softcap=True),
)
"""In the order of preference, which is that of the dispatch table; the last takes everything."""

_META = Backend("meta", lambda q, k, v: None, meta.forward, meta.backward, softcap=True)
"""Beside the table: on the meta device nothing is computed, so there is nothing to choose."""

_BY_NAME = {backend.name: backend for backend in BACKENDS}


def choose_backend(
    q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None = None, name: str | None = None
) -> Backend:
    """Take the backend that is forced, here or by `use_backend`, or the first that supports a call.

    A call for which only the slow reference is left is warned about once. Nothing is chosen on the meta device.

    Args:
        q, k, v: as in ``QueryTile``; only shape, dtype and device are looked at.
        softcap: as in ``QueryTile``.
        name: of a backend; None lets the table decide.
    Raises: BackendError: ``name`` is unknown, or the forced backend does not support the call.
    """
    if q.is_meta:
        return _META
    if name is not None:
        return _named(name, q, k, v, softcap)
    if dispatcher().forced_for("attention") is None:
        chosen = next(backend for backend in BACKENDS if backend.why_not(q, k, v, softcap=softcap) is None)
        if chosen.name != "reference" or q.device.type not in ("cpu", "cuda"):
            return chosen
    found = _choose(q, k, v, softcap)
    if found.backend == "reference" and dispatcher().forced_for("attention") is None:
        dispatcher().report(f"attention runs in longfit's slow reference; {found.reason}")
    return _BY_NAME[found.backend]


def choice(device: torch.device, dtype: torch.dtype, *, head_dim: int = 64, softcap: float | None = None) -> Choice:
    """Return the backend of attention for a device, a dtype and a head dimension, and why."""
    q = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    return _choose(q, q, q, softcap)


def _choose(q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> Choice:
    return dispatcher().choose_call("attention", lambda name: _BY_NAME[name].why_not(q, k, v, softcap=softcap))


def _named(name: str, q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> Backend:
    if name not in _BY_NAME:
        raise BackendError(f"attention backend {name!r}: unknown; allowed are {', '.join(_BY_NAME)}")
    reason = _BY_NAME[name].why_not(q, k, v, softcap=softcap)
    if reason is not None:
        raise BackendError(f"attention backend {name!r}: {reason}; let longfit choose, or force another")
    return _BY_NAME[name]


def tile_forward(tile: QueryTile, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Attend from a tile of queries to the keys its schedule shows.

    Args:
        tile: queries ``[B, H, t, D]``, keys and values ``[B, K, n, D]``.
        backend: forces one by name.
    Returns: out ``[B, H, t, D]`` in the dtype of the queries, stored as ``[B, t, H, D]``; natural log-sum-exp of the
        scores, float32 (float64 for float64) ``[B, H, t]``.
    Raises: BackendError: as ``choose_backend``.
    """
    out, lse = choose_backend(tile.q, tile.k, tile.v, softcap=tile.softcap, name=backend).forward(tile)
    return (out, lse) if tile.sinks is None else _with_sinks(out, lse, tile.sinks)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The result of a softmax with one more logit of value zero: every weight shrinks by the same factor.

    Given the new log-sum-exp, ``tile_backward`` is exact as it is: it weighs keys by ``exp(score - lse)``, and the sink
    adds nothing to ``rowsum(grad_out * out)``.
    """
    both = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])  # [B, H, t]
    return out.mul_((lse - both).exp_().to(out.dtype)[..., None]), both


def sinks_grad(grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradient ``[H]`` of the sinks, in float32 (float64 for float64): minus their weight times what the row lost.

    Args:
        grad_out: ``[B, H, t, D]``.
        out, lse: what ``tile_forward`` returned with the sinks.
        sinks: ``[H]``.
    """
    weight = (sinks.to(lse.dtype)[:, None] - lse).exp_()  # [B, H, t]
    return -(weight * (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)).sum((0, 2))


def tile_backward(
    tile: QueryTile,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    grad_k: Tensor,
    grad_v: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Differentiate ``tile_forward``.

    Args:
        tile: that of the forward.
        grad_out: ``[B, H, t, D]``.
        out, lse: what the forward returned, by whichever backend, with sinks or without.
        grad_k, grad_v: float32 (float64 for float64) ``[B, K, n, D]``; the tile's share is **added in place**.
        backend: forces one by name.
    Returns: grad_q ``[B, H, t, D]`` in the dtype of the queries.
    Raises: ValueError: ``grad_k`` or ``grad_v`` does not fit. BackendError: as ``choose_backend``.
    """
    k, v = tile.k, tile.v
    if grad_k.shape != k.shape or grad_v.shape != v.shape or grad_k.dtype != lse.dtype or grad_v.dtype != lse.dtype:
        raise ValueError(
            f"grad_k {describe(grad_k)}, grad_v {describe(grad_v)}: must have the shapes of k {list(k.shape)} and"
            f" v {list(v.shape)} in {lse.dtype}"
        )
    chosen = choose_backend(tile.q, k, v, softcap=tile.softcap, name=backend)
    return chosen.backward(tile, grad_out, out, lse, grad_k=grad_k, grad_v=grad_v)
