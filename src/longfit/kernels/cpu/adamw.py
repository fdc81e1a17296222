"""The AdamW step in C++: one fused pass over runs of elements, with the bits of ``numerics/adamw.py``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_uint32, c_void_p
from functools import cache

import torch
from torch import Tensor

from longfit.kernels.cpu.library import DTYPES, library
from longfit.numerics import adamw
from longfit.numerics.adamw import BLOCK_SIZE, AdamwUpdate
from longfit.numerics.codebooks import dynamic_map

_LOW_32 = 0xFFFFFFFF


class AdamwRun(ctypes.Structure):
    """``longfit_adamw_run`` of csrc/adamw.h, which explains the fields."""

    _fields_ = [
        ("param", c_void_p),
        ("grad", c_void_p),
        ("exp_avg", c_void_p),
        ("exp_avg_sq", c_void_p),
        ("exp_avg_absmax", c_void_p),
        ("exp_avg_sq_absmax", c_void_p),
        ("master", c_void_p),
        ("maps", c_void_p),
        ("numel", c_int64),
        ("end_block", c_int64),
        ("rounding_key", c_uint32),
        ("start", c_uint32),
        ("param_dtype", c_int32),
        ("grad_dtype", c_int32),
        ("decay", c_float),
        ("beta1", c_float),
        ("grad_weight", c_float),
        ("beta2", c_float),
        ("square_weight", c_float),
        ("step_size", c_float),
        ("root_scale", c_float),
        ("eps", c_float),
    ]


def adamw_step(updates: Sequence[AdamwUpdate]) -> None:
    """See `longfit.numerics.adamw.adamw_step`, which also steps the fp64 parameters, as they are rare."""
    adamw.adamw_step([update for update in updates if update.param.dtype == torch.float64])
    native = [update for update in updates if update.param.dtype != torch.float64]
    grads = [_readable(update.grad) for update in native]  # held until the kernel has returned
    runs = (AdamwRun * len(native))()
    end_block = 0
    for run, update, grad in zip(runs, native, grads, strict=True):
        end_block += -(-update.param.numel() // BLOCK_SIZE)
        _describe(run, update, grad, end_block)
    library().kernel("adamw")(runs, len(native), torch.get_num_threads())


def _describe(run: AdamwRun, update: AdamwUpdate, grad: Tensor, end_block: int) -> None:
    state, scalars = update.state, update.scalars
    run.param, run.param_dtype = update.param.data_ptr(), DTYPES[update.param.dtype]
    run.grad, run.grad_dtype = grad.data_ptr(), DTYPES[grad.dtype]
    run.exp_avg, run.exp_avg_sq = state.exp_avg.data_ptr(), state.exp_avg_sq.data_ptr()
    if state.exp_avg_absmax is not None and state.exp_avg_sq_absmax is not None:
        run.exp_avg_absmax, run.exp_avg_sq_absmax = state.exp_avg_absmax.data_ptr(), state.exp_avg_sq_absmax.data_ptr()
        run.maps = _maps(library().isa).data_ptr()
    if state.master is not None:
        run.master = state.master.data_ptr()
    run.numel, run.end_block = update.param.numel(), end_block
    run.rounding_key, run.start = update.rounding_key, update.start & _LOW_32
    run.decay, run.step_size, run.root_scale, run.eps = (
        scalars.decay,
        scalars.step_size,
        scalars.root_scale,
        scalars.eps,
    )
    run.beta1, run.grad_weight = scalars.beta1, scalars.grad_weight
    run.beta2, run.square_weight = scalars.beta2, scalars.square_weight


def _readable(grad: Tensor) -> Tensor:
    return grad.contiguous() if grad.dtype in DTYPES else grad.float()


@cache
def _maps(isa: str) -> Tensor:
    """Return the tables that the kernels of an instruction set make of the two dynamic maps."""
    signed, unsigned = dynamic_map(signed=True), dynamic_map(signed=False)
    num_bytes = torch.zeros((), dtype=torch.int64)
    prepare = library().kernel("adamw_maps")
    prepare(signed.data_ptr(), unsigned.data_ptr(), None, num_bytes.data_ptr())
    tables = torch.empty(int(num_bytes), dtype=torch.uint8)  # torch aligns to 64 bytes, as the tables want
    prepare(signed.data_ptr(), unsigned.data_ptr(), tables.data_ptr(), num_bytes.data_ptr())
    assert int(num_bytes), f"the kernels for {isa} cannot represent the dynamic maps"
    return tables
