"""The AdamW step on a CUDA device: one launch for all runs of a page, with the rounding order of ``numerics/adamw.py``.

A page of optimiser state holds runs of many parameters. Their addresses and scalars go to the device as a small table;
a program finds its run in it by binary search, then takes four blocks of 256 elements through the whole step in
registers: decode the moments, move them, take the step, encode them again. An element is read and written once.

Products, sums, roots and quotients are rounded one by one, as the reference says, and so are stochastic rounding's hash
and the codes. Parameters in float64 are rare and go to the reference, as do bfloat16 ones on cards without bfloat16.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longfit.kernels.triton.blocks import largest_magnitude, levels_of, nearest_rank, scale_to_one, tables_of
from longfit.kernels.triton.device import kernel_dtype, on_device
from longfit.numerics import adamw
from longfit.numerics.adamw import BLOCK_SIZE, AdamwUpdate

_NUM_BLOCKS = 4  # blocks of 256 elements that a program steps
_CHUNK = _NUM_BLOCKS * BLOCK_SIZE
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# What tells one compiled kernel from another: dtypes of parameter and gradient, 8-bit moments, a master.
_Form = tuple[torch.dtype, torch.dtype, bool, bool]


@triton.jit
def _find_run(first_chunks, num_runs, chunk, BITS: tl.constexpr):
    """Return the last run that begins at or before a chunk; there are at most ``2 ** BITS``."""
    run = chunk * 0
    for bit in tl.static_range(BITS):
        probe = run + (1 << (BITS - 1 - bit))
        begin = tl.load(first_chunks + probe, mask=probe < num_runs, other=chunk + 1)
        run = tl.where(begin <= chunk, probe, run)
    return run


@triton.jit
def _round_stochastically(values, number, key):
    """``numerics/stochastic_rounding.py`` on the elements with these numbers."""
    bits = number ^ key
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = bits ^ (bits >> 16)
    rounded = (values.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
    finite = tl.abs(values) < float("inf")
    return tl.where(finite, rounded.to(tl.float32, bitcast=True), values).to(tl.bfloat16)


@triton.jit
def _encode(moment, thresholds, codes, absmax, block, inside_block, index, inside, POSITIVE: tl.constexpr):
    largest, _ = largest_magnitude(moment)
    rank = nearest_rank(scale_to_one(moment, largest[:, None]), thresholds, 8)  # these maps ascend: a rank is a code
    if POSITIVE:
        rank = tl.maximum(rank, (moment > 0).to(tl.int32))
    tl.store(absmax + block, largest, mask=inside_block)
    tl.store(codes + index, rank.to(tl.uint8), mask=inside)


@triton.jit
def _step(
    table, scalars, first_chunks, num_runs, signed_levels, unsigned_levels, signed_thresholds, unsigned_thresholds,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EIGHT_BITS: tl.constexpr, MASTER: tl.constexpr, RUN_BITS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    run = _find_run(first_chunks, num_runs, chunk, RUN_BITS)
    entry = table + run * 10
    numel = tl.load(entry + 7)
    block = (chunk - tl.load(first_chunks + run)) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS)
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, inside_block = index < numel, block * BLOCK < numel

    param_place = tl.load(entry).to(tl.pointer_type(PARAM)) + index
    param = tl.load(param_place, mask=inside, other=0.0)
    grad = tl.load(tl.load(entry + 1).to(tl.pointer_type(GRAD)) + index, mask=inside, other=0.0).to(tl.float32)
    wide = param.to(tl.float32)
    if MASTER:
        master_place = tl.load(entry + 6).to(tl.pointer_type(tl.float32)) + index
        master = tl.load(master_place, mask=inside, other=0.0)
        wide = tl.where(master.to(PARAM).to(tl.float32) == wide, master, wide)
    if EIGHT_BITS:
        m_codes = tl.load(entry + 2).to(tl.pointer_type(tl.uint8))
        v_codes = tl.load(entry + 3).to(tl.pointer_type(tl.uint8))
        m_absmax = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
        v_absmax = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
        m = tl.load(signed_levels + tl.load(m_codes + index, mask=inside, other=0).to(tl.int32))
        v = tl.load(unsigned_levels + tl.load(v_codes + index, mask=inside, other=0).to(tl.int32))
        m = m * tl.load(m_absmax + block, mask=inside_block, other=0.0)[:, None]
        v = v * tl.load(v_absmax + block, mask=inside_block, other=0.0)[:, None]
    else:
        m_place = tl.load(entry + 2).to(tl.pointer_type(tl.float32)) + index
        v_place = tl.load(entry + 3).to(tl.pointer_type(tl.float32)) + index
        m = tl.load(m_place, mask=inside, other=0.0)
        v = tl.load(v_place, mask=inside, other=0.0)

    scalar = scalars + run * 8  # in the order of StepScalars
    wide = wide * tl.load(scalar)
    m = m * tl.load(scalar + 1) + grad * tl.load(scalar + 2)
    v = v * tl.load(scalar + 3) + (grad * tl.load(scalar + 4)) * grad
    denominator = tl.sqrt_rn(v) * tl.load(scalar + 6) + tl.load(scalar + 7)
    wide = wide - tl.div_rn(m * tl.load(scalar + 5), denominator)

    if MASTER:
        tl.store(master_place, wide, mask=inside)
        tl.store(param_place, wide.to(PARAM), mask=inside)
    elif tl.float32 == PARAM:
        tl.store(param_place, wide, mask=inside)
    else:
        number = (tl.load(entry + 9) + index).to(tl.uint32)
        tl.store(param_place, _round_stochastically(wide, number, tl.load(entry + 8).to(tl.uint32)), mask=inside)
    if EIGHT_BITS:
        finite = (tl.abs(m) < float("inf")) & inside
        m = tl.where(finite, m, 0.0)
        v = tl.where(finite, tl.minimum(v, tl.full(v.shape, _LARGEST, tl.float32)), 0.0)
        _encode(m, signed_thresholds, m_codes, m_absmax, block, inside_block, index, inside, False)
        _encode(v, unsigned_thresholds, v_codes, v_absmax, block, inside_block, index, inside, True)
    else:
        tl.store(m_place, m, mask=inside)
        tl.store(v_place, v, mask=inside)


def adamw_step(updates: Sequence[AdamwUpdate]) -> None:
    """See `longfit.numerics.adamw.adamw_step`."""
    groups: dict[_Form | None, list[tuple[AdamwUpdate, Tensor]]] = defaultdict(list)
    for update in updates:
        if update.param.numel():
            grad = update.grad.contiguous() if update.grad.dtype in _DTYPES else update.grad.float()
            groups[_form(update, grad)].append((update, grad))
    for form, group in groups.items():
        if form is None:
            adamw.adamw_step([update for update, _ in group])
        else:
            _launch(group, form)


def _form(update: AdamwUpdate, grad: Tensor) -> _Form | None:
    """Return which kernel steps a run; None if the reference does."""
    param, state = update.param, update.state
    if kernel_dtype(param.dtype, param.device) != param.dtype or kernel_dtype(grad.dtype, grad.device) != grad.dtype:
        return None
    return param.dtype, grad.dtype, state.exp_avg_absmax is not None, state.master is not None


def _launch(group: list[tuple[AdamwUpdate, Tensor]], form: _Form) -> None:
    device = group[0][0].param.device
    param_dtype, grad_dtype, eight_bits, master = form
    first_chunks, num_chunks = [], 0
    for update, _ in group:
        first_chunks.append(num_chunks)
        num_chunks += triton.cdiv(update.param.numel(), _CHUNK)
    scalars = [astuple(update.scalars) for update, _ in group]
    with on_device(group[0][0].param):
        _step[(num_chunks,)](
            _to(device, [_entry(update, grad) for update, grad in group], torch.int64),
            _to(device, scalars, torch.float32),
            _to(device, first_chunks, torch.int64),
            len(group),
            levels_of("dynamic8", device), levels_of("moment2", device),
            tables_of("dynamic8", device)[0], tables_of("moment2", device)[0],
            PARAM=_DTYPES[param_dtype], GRAD=_DTYPES[grad_dtype], EIGHT_BITS=eight_bits, MASTER=master,
            RUN_BITS=(len(group) - 1).bit_length(), NUM_BLOCKS=_NUM_BLOCKS, BLOCK=BLOCK_SIZE, enable_fp_fusion=False,
        )  # fmt: skip


def _entry(update: AdamwUpdate, grad: Tensor) -> tuple[int, ...]:
    """Return a run's line of the table."""
    state = update.state
    tensors = (
        update.param, grad, state.exp_avg, state.exp_avg_sq, state.exp_avg_absmax, state.exp_avg_sq_absmax,
        state.master,
    )  # fmt: skip
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    return (*addresses, update.param.numel(), update.rounding_key, update.start)


def _to(device: torch.device, values: object, dtype: torch.dtype) -> Tensor:
    """Copy numbers to the device; nobody waits, as the driver takes them over before the call returns."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
