"""Root-mean-square norm, gated product and cross-entropy in C++, each with its gradient, over float32, bf16 and fp16.

Written as torch operations these cost more than their share: the norm makes copies of its input, the gated product
keeps two tensors of the intermediate size and makes two more in backward, the cross-entropy passes over the logits nine
times. Here an element is worked on in registers between its load and its store (``csrc/elementwise/*.cpp``), in float32
arithmetic on every instruction set. What the torch operations round to 16 bits on the way is rounded here too.

The kernels know nothing of modules: ``engine/sweep/fused_modules.py`` finds out which modules compute such a function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longfit.kernels.cpu.library import DTYPES, library, unavailable

SUMMED_ROWS = 64
"""Rows whose share in the gradient of a norm's weight is added up in turn: the same ones for any number of threads."""


def supported() -> str | None:
    """Say why this machine cannot run the kernels; None when it can."""
    return unavailable()


def takes(*tensors: Tensor) -> bool:
    """Whether these are what the kernels read: plain tensors of one dtype on the CPU, not those of a trace."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(
        type(t.data) is Tensor and t.dtype == dtype and t.device.type == "cpu" for t in tensors
    )


def rms_norm_forward(x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Compute ``w * (x / sqrt(mean(x^2) + eps))`` of each row, the quotient rounded to the dtype of x.

    Args:
        x: float32, bf16 or fp16 ``[..., D]``.
        weight: ``[D]`` in the same dtype.
        eps: added to the mean square.
    Returns: the norm, ``[..., D]`` in the dtype of ``x``; what each row was multiplied by, fp32 ``[N]``.
    Raises: ValueError: shapes or dtypes are others. BackendError: the library is missing.
    """
    _check(x, x)
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"weight {_describe(weight)}: must be {list(x.shape[-1:])} in {x.dtype}")
    x, weight = x.contiguous(), weight.contiguous()
    out, inverse_rms = torch.empty_like(x), x.new_empty(x[..., 0].numel(), dtype=torch.float32)
    library().kernel("rms_norm_forward")(
        x.data_ptr(),
        weight.data_ptr(),
        eps,
        len(inverse_rms),
        x.shape[-1],
        out.data_ptr(),
        inverse_rms.data_ptr(),
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return out, inverse_rms


def rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, *, trains: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `rms_norm_forward` with respect to ``x`` and, if it trains, ``weight``.

    Args:
        grad_out: ``[..., D]`` in the dtype of ``x``.
        x, weight: those of the forward.
        inverse_rms: what it returned.
        trains: whether the gradient of ``weight`` is wanted.
    Returns: one like ``x``; fp32 ``[D]``, whose products and sums are never rounded to 16 bits, or None.
    """
    _check(grad_out, x)
    grad_out, x, weight = grad_out.contiguous(), x.contiguous(), weight.contiguous()
    grad_x, rows = torch.empty_like(x), len(inverse_rms)
    sums = inverse_rms.new_empty(-(-rows // SUMMED_ROWS), x.shape[-1]) if trains else None
    library().kernel("rms_norm_backward")(
        grad_out.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        inverse_rms.data_ptr(),
        rows,
        x.shape[-1],
        grad_x.data_ptr(),
        None if sums is None else sums.data_ptr(),
        SUMMED_ROWS,
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return grad_x, None if sums is None else sums.sum(0)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Compute ``silu(gate) * up``, both in one shape and dtype; silu is rounded to that before the product.

    Raises: ValueError: shapes or dtypes are others. BackendError: the library is missing.
    """
    _check(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    library().kernel("swiglu_forward")(
        gate.data_ptr(), up.data_ptr(), gate.numel(), out.data_ptr(), DTYPES[gate.dtype], torch.get_num_threads()
    )
    return out


def swiglu_backward(grad_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `swiglu_forward` with respect to ``gate`` and ``up``."""
    _check(gate, up)
    _check(grad_out, gate)
    grad_out, gate, up = grad_out.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    library().kernel("swiglu_backward")(
        grad_out.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        gate.numel(),
        grad_gate.data_ptr(),
        grad_up.data_ptr(),
        DTYPES[gate.dtype],
        torch.get_num_threads(),
    )
    return grad_gate, grad_up


def cross_entropy_(logits: Tensor, labels: Tensor, *, factor: float) -> Tensor:
    """Write the gradient of ``factor * sum(cross-entropy)`` over the logits, and return the cross-entropies.

    Args:
        logits: float32, bf16 or fp16 ``[N, V]``, dense; becomes ``(softmax - onehot(label)) * factor``.
        labels: int64 ``[N]``, from 0 to V - 1.
        factor: of the gradient alone.
    Returns: fp32 ``[N]``.
    Raises: ValueError: shapes or dtypes are others. BackendError: the library is missing.
    """
    _check(logits, logits)
    if (
        logits.dim() != 2
        or not logits.is_contiguous()
        or labels.shape != logits.shape[:1]
        or labels.dtype != torch.int64
    ):
        raise ValueError(
            f"logits {_describe(logits)}, labels {_describe(labels)}: must be dense [N, V] and [N] in torch.int64"
        )
    labels, losses = labels.contiguous(), logits.new_empty(len(logits), dtype=torch.float32)
    library().kernel("cross_entropy")(
        logits.data_ptr(),
        labels.data_ptr(),
        factor,
        *logits.shape,
        losses.data_ptr(),
        DTYPES[logits.dtype],
        torch.get_num_threads(),
    )
    return losses


def _check(x: Tensor, like: Tensor) -> None:
    if x.shape != like.shape or not takes(x, like):
        allowed = ", ".join(map(str, DTYPES))
        raise ValueError(f"{_describe(x)} and {_describe(like)}: must be one shape in one of {allowed} on the CPU")


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} in {x.dtype} on {x.device.type}"
