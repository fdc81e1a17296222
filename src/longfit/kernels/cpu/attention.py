"""Attention of a tile of queries over all earlier keys in C++: forward with log-sum-exp, and backward from it.

There are two kernels. ``csrc/attention/attention_*_f32.cpp`` serves every instruction set: float32, bf16 or fp16
tensors, all arithmetic in float32. ``attention_*_avx512bf16.cpp`` multiplies bf16 pairs, with vdpbf16ps or in the tile
registers of AMX: sums are float32, but P and dS are rounded to bf16 before the products that consume them, as on a
GPU's tensor cores. It takes bf16 tensors where the processor has AVX-512 BF16. The log-sum-exp is good to float32 in
both. The same call gives the same bits every time, on any number of threads.

What a query sees is one number per head class: all keys from ``first_key`` to itself. Exact and shifted attention
(LongLoRA, section 3.2), sliding windows and packed documents all have that form; keys that a block of queries does not
see cost nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from longfit.kernels.cpu.library import DTYPES, library, unavailable


class View(ctypes.Structure):
    """``longfit_attention_view`` of csrc/attention.h, which explains the fields."""

    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("token", c_int64)]


class TileStruct(ctypes.Structure):
    """``longfit_attention_tile`` of csrc/attention.h, which explains the fields."""

    _fields_ = [
        ("batch", c_int64),
        ("query_heads", c_int64),
        ("kv_heads", c_int64),
        ("queries", c_int64),
        ("keys", c_int64),
        ("head_dim", c_int64),
        ("classes", c_int64),
        ("start", c_int64),
        ("first_key", c_void_p),
        ("head_bounds", c_void_p),
        ("out_of_memory", c_void_p),
        ("scaling", c_float),
        ("threads", c_int32),
    ]


def supported() -> str | None:
    """Say why this machine cannot run the kernels; None when it can."""
    return unavailable()


def multiplies_bf16() -> bool:
    """Whether bf16 tensors meet in bf16 products, and P and dS are rounded for that."""
    return library().multiplies_bf16


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    head_bounds: Sequence[int],
    *,
    start: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attend from the queries of a tile to the keys they see (FlashAttention-2, algorithm 1).

    Args:
        q: float32, bf16 or fp16 ``[B, H, t, D]``, tokens ``[start, start + t)``; any strides.
        k, v: ``[B, K, n, D]`` in the same dtype, tokens ``[0, n)``; H a multiple of K.
        first_key: int32 ``[C, B, t]``; query i of a head of class c sees the keys ``first_key[c, b, i] .. start + i``.
            It never decreases along t, and all that it shows is in ``k``.
        head_bounds: C + 1 numbers; class c is the query heads ``[head_bounds[c], head_bounds[c + 1])``.
        start: the token number of the first query.
        scaling: of the scores; any sign.
    Returns: out ``[B, H, t, D]`` in the dtype of ``q``, stored as ``[B, t, H, D]``; natural log-sum-exp of the scores,
        fp32 ``[B, H, t]``.
    Raises: ValueError: the arguments do not fit each other. BackendError: the library is missing. MemoryError.
    """
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    call = _Call(q, k, v, first_key, head_bounds, start=start, scaling=scaling)
    batch, heads, queries, head_dim = q.shape
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)  # [B, H, t, D]
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if q.numel():
        call.run("attention_forward", _view(q), _view(k), _view(v), _view(out), lse.data_ptr())
    return out, lse


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first_key: Tensor,
    head_bounds: Sequence[int],
    *,
    start: int,
    scaling: float,
    grad_k: Tensor,
    grad_v: Tensor,
) -> Tensor:
    """Differentiate `attention_forward` (FlashAttention-2, algorithm 2).

    Args:
        grad_out: ``[B, H, t, D]`` in the dtype of ``q``.
        q, k, v, first_key, head_bounds, start, scaling: those of the forward.
        out, lse: what it returned; another kernel's will do.
        grad_k, grad_v: fp32 ``[B, K, n, D]``; the tile's share is **added in place**.
    Returns: grad_q ``[B, H, t, D]`` in the dtype of ``q``, stored as ``[B, t, H, D]``.
    Raises: as `attention_forward`.
    """
    grad_out, q, k, v, out = (_unit_stride(x) for x in (grad_out, q, k, v, out))
    call = _Call(q, k, v, first_key, head_bounds, start=start, scaling=scaling)
    batch, heads, queries, head_dim = q.shape
    for name, x, like, dtype in (
        ("grad_out", grad_out, q, q.dtype),
        ("out", out, q, q.dtype),
        ("grad_k", grad_k, k, torch.float32),
        ("grad_v", grad_v, v, torch.float32),
    ):
        if x.shape != like.shape or x.dtype != dtype or x.device.type != "cpu":
            raise ValueError(f"{name}: got {_describe(x)}, must be {list(like.shape)} in {dtype} on the CPU")
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32:
        raise ValueError(f"lse: got {_describe(lse)}, must be {list(q.shape[:3])} in torch.float32")
    if any(x.stride(3) != 1 and head_dim > 1 for x in (grad_k, grad_v)):
        raise ValueError(f"grad_k {grad_k.stride()}, grad_v {grad_v.stride()}: the last stride must be 1")
    grad_q = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)  # [B, H, t, D]
    if q.numel():
        lse = lse.contiguous()
        inputs = (_view(x) for x in (grad_out, q, k, v, out))
        grads = (_view(x) for x in (grad_q, grad_k, grad_v))
        call.run("attention_backward", *inputs, lse.data_ptr(), *grads)
    return grad_q


class _Call:
    """The description of a tile, and the tensors that it points into."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first_key: Tensor,
        head_bounds: Sequence[int],
        *,
        start: int,
        scaling: float,
    ) -> None:
        _check(q, k, v, first_key, head_bounds, start=start)
        self._first_key = first_key.contiguous()
        self._head_bounds = torch.tensor(head_bounds, dtype=torch.int64)
        self._out_of_memory = torch.zeros((), dtype=torch.int32)
        batch, heads, queries, head_dim = q.shape
        self._dtype = q.dtype
        self._tile = TileStruct(
            batch=batch,
            query_heads=heads,
            kv_heads=k.shape[1],
            queries=queries,
            keys=k.shape[2],
            head_dim=head_dim,
            classes=first_key.shape[0],
            start=start,
            first_key=self._first_key.data_ptr(),
            head_bounds=self._head_bounds.data_ptr(),
            out_of_memory=self._out_of_memory.data_ptr(),
            scaling=scaling,
            threads=torch.get_num_threads(),
        )

    def run(self, kernel: str, *arguments: View | int) -> None:
        pointers = (ctypes.byref(x) if isinstance(x, View) else x for x in arguments)
        if self._dtype == torch.bfloat16 and multiplies_bf16():
            library().kernel(kernel)(ctypes.byref(self._tile), *pointers)
        else:
            library().kernel(f"{kernel}_f32")(ctypes.byref(self._tile), DTYPES[self._dtype], *pointers)
        if self._out_of_memory:
            raise MemoryError(f"{kernel}: no memory for {self._tile.queries} queries; choose a smaller tile")


def _check(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, head_bounds: Sequence[int], *, start: int) -> None:
    if q.dtype not in DTYPES or any(x.dim() != 4 or x.dtype != q.dtype or x.device.type != "cpu" for x in (q, k, v)):
        raise ValueError(
            f"q {_describe(q)}, k {_describe(k)}, v {_describe(v)}: must be [B, H, t, D] and twice [B, K, n, D] in"
            f" one of {', '.join(map(str, DTYPES))} on the CPU"
        )
    batch, heads, queries, head_dim = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != head_dim or not k.shape[1] or heads % k.shape[1]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: must be [B, H, t, D] and twice [B, K, n, D] with"
            " H a multiple of K"
        )
    bounds = list(head_bounds)
    if bounds[:1] != [0] or bounds[-1:] != [heads] or bounds != sorted(bounds):
        raise ValueError(f"head_bounds {bounds}: must rise from 0 to the {heads} query heads")
    if first_key.shape != (len(bounds) - 1, batch, queries) or first_key.dtype != torch.int32:
        expected = [len(bounds) - 1, batch, queries]
        raise ValueError(f"first_key: got {_describe(first_key)}, must be {expected} in torch.int32")
    if start < 0 or start + queries > k.shape[2]:
        raise ValueError(
            f"queries {start} .. {start + queries - 1} do not see themselves among the keys 0 .. {k.shape[2] - 1}; a"
            " query's own key must be there"
        )
    if not q.numel():
        return
    itself = torch.arange(start, start + queries, dtype=torch.int32)
    if int(first_key.min()) < 0 or (first_key > itself).any() or (first_key.diff() < 0).any():
        raise ValueError(
            "first_key: must never decrease along the queries, and show each query itself and no key before the first"
        )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _view(x: Tensor) -> View:
    return View(x.data_ptr(), *x.stride()[:3])


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} in {x.dtype} on {x.device.type}"
