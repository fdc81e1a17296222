"""The AdamW step in C++: one fused pass over a run of elements, with the bits of ``numerics/adamw.py``."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_uint32, c_void_p
from functools import cache

import torch
from torch import Tensor

from longfit.kernels.cpu import library
from longfit.numerics import adamw
from longfit.numerics.adamw import RunState, StepScalars
from longfit.numerics.codebooks import dynamic_map

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
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


def adamw_run(
    param: Tensor, grad: Tensor, state: RunState, scalars: StepScalars, *, rounding_key: int = 0, start: int = 0
) -> None:
    """See `longfit.numerics.adamw.adamw_run`; an fp64 parameter is stepped by it, as it is rare."""
    if param.dtype == torch.float64:
        adamw.adamw_run(param, grad, state, scalars)
        return
    grad = grad.contiguous() if grad.dtype in _DTYPES else grad.float()
    run = AdamwRun(
        param=param.data_ptr(),
        grad=grad.data_ptr(),
        exp_avg=state.exp_avg.data_ptr(),
        exp_avg_sq=state.exp_avg_sq.data_ptr(),
        exp_avg_absmax=_pointer(state.exp_avg_absmax),
        exp_avg_sq_absmax=_pointer(state.exp_avg_sq_absmax),
        master=_pointer(state.master),
        maps=None if state.exp_avg_absmax is None else _maps(library().isa).data_ptr(),
        numel=param.numel(),
        rounding_key=rounding_key,
        start=start & _LOW_32,
        param_dtype=_DTYPES[param.dtype],
        grad_dtype=_DTYPES[grad.dtype],
        decay=scalars.decay,
        beta1=scalars.beta1,
        grad_weight=scalars.grad_weight,
        beta2=scalars.beta2,
        square_weight=scalars.square_weight,
        step_size=scalars.step_size,
        root_scale=scalars.root_scale,
        eps=scalars.eps,
    )
    library().kernel("adamw")(ctypes.byref(run), torch.get_num_threads())


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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
