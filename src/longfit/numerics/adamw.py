"""AdamW on a run of elements, with float32 masters and with 8-bit moments: the reference of every optimiser kernel.

Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2, written as
torch.optim.AdamW runs it: the weights decay first, then the moments move, then the step is taken.

    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + ((1 - beta2) * g) * g
    p = p - (step_size * m) / (sqrt(v) * root_scale + eps)
    with step_size = lr / (1 - beta1 ** t) and root_scale = 1 / sqrt(1 - beta2 ** t)

Every ``*``, ``+``, ``-``, ``/`` and ``sqrt`` is one rounding in fp32 (fp64 for fp64 parameters), in the order of the
parentheses and never fused: that order is the contract that makes a trajectory the same on every backend.

8-bit moments (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861): after its step each
block of 256 is rounded to the nearest level of the signed (m) or unsigned (v) dynamic map. Three corners are settled
here, where implementations differ:

- a positive v never rounds to level 0: it takes the smallest positive level. A second moment of 0 beside a first moment
  that is not 0 would make the next step m / eps;
- m takes the nearest level like any other value. That may be 0, but is never of the other sign;
- a NaN or an infinite gradient makes its own weight NaN, as torch does, but its moments are stored as 0 (an infinite v
  of a finite gradient as the largest float), so that the 255 others of its block go on undisturbed.

What it is not: it knows nothing of parameters, pages or param groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.numerics.blockwise import dequantize_blockwise, quantize_blockwise
from longfit.numerics.codebooks import dynamic_map
from longfit.numerics.stochastic_rounding import round_stochastically

BLOCK_SIZE = 256  # elements per absmax of an 8-bit moment

# Elements handled at once, whole blocks: the temporaries of a run of any length stay within a second-level cache.
SLICE_NUMEL = 1 << 16


@dataclass(frozen=True)
class StepScalars:
    """The numbers of one step that are the same for every element, computed once in double precision."""

    decay: float  # 1 - lr * weight_decay
    beta1: float
    grad_weight: float  # 1 - beta1
    beta2: float
    square_weight: float  # 1 - beta2
    step_size: float  # lr / (1 - beta1 ** step)
    root_scale: float  # 1 / sqrt(1 - beta2 ** step)
    eps: float


@dataclass(frozen=True)
class AdamwState:
    """The state of ``n`` consecutive elements of one parameter; the tensors are changed in place.

    ``exp_avg`` and ``exp_avg_sq`` are fp32 (fp64 for an fp64 parameter) or, with their absmax beside them, 8-bit codes.
    A new state is all zeros, whatever its form.
    """

    exp_avg: Tensor  # [n] fp32, fp64 or uint8
    exp_avg_sq: Tensor  # [n] likewise
    exp_avg_absmax: Tensor | None = None  # [ceil(n / 256)] fp32
    exp_avg_sq_absmax: Tensor | None = None  # [ceil(n / 256)] fp32
    master: Tensor | None = None  # [n] fp32

    def part(self, run: slice) -> "AdamwState":
        """Return the state of some of the elements; ``run`` begins at a multiple of 256."""
        blocks = slice(run.start // BLOCK_SIZE, -(-run.stop // BLOCK_SIZE))
        return AdamwState(
            exp_avg=self.exp_avg[run],
            exp_avg_sq=self.exp_avg_sq[run],
            exp_avg_absmax=None if self.exp_avg_absmax is None else self.exp_avg_absmax[blocks],
            exp_avg_sq_absmax=None if self.exp_avg_sq_absmax is None else self.exp_avg_sq_absmax[blocks],
            master=None if self.master is None else self.master[run],
        )


def step_scalars(step: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> StepScalars:
    """Return the scalars of step number ``step``, which counts from 1."""
    beta1, beta2 = betas
    return StepScalars(
        decay=1 - lr * weight_decay,
        beta1=beta1,
        grad_weight=1 - beta1,
        beta2=beta2,
        square_weight=1 - beta2,
        step_size=lr / (1 - beta1**step),
        root_scale=1 / math.sqrt(1 - beta2**step),
        eps=eps,
    )


@dataclass(frozen=True)
class AdamwUpdate:
    """One step of ``n`` consecutive elements of one parameter; ``param`` and ``state`` are changed in place.

    Attributes:
        param: ``[n]`` contiguous, fp32, fp64, bf16 or fp16. A 16-bit parameter follows ``state.master``; without one it
            must be bf16 and is rounded stochastically.
        grad: ``[n]`` of any float dtype.
        state: of the same elements; with 8-bit moments the run must begin at a multiple of 256.
        rounding_key, start: see ``round_stochastically``; unused otherwise.
    """

    param: Tensor
    grad: Tensor
    state: AdamwState
    scalars: StepScalars
    rounding_key: int = 0
    start: int = 0


def adamw_step(updates: Sequence[AdamwUpdate]) -> None:
    """Take one AdamW step on runs of elements that do not overlap, all on one device."""
    for update in updates:
        for begin in range(0, update.param.numel(), SLICE_NUMEL):
            _step_slice(update, slice(begin, min(begin + SLICE_NUMEL, update.param.numel())))


def _step_slice(update: AdamwUpdate, here: slice) -> None:
    param, state, scalars = update.param[here], update.state.part(here), update.scalars
    grad = update.grad[here].to(torch.promote_types(param.dtype, torch.float32))
    exp_avg, exp_avg_sq = _decode_moments(state)
    if param.dtype == grad.dtype:
        _move(param, grad, exp_avg, exp_avg_sq, scalars)
    elif state.master is not None:
        _refresh_master(state.master, param)
        _move(state.master, grad, exp_avg, exp_avg_sq, scalars)
        param.copy_(state.master)
    else:
        wide = param.float()
        _move(wide, grad, exp_avg, exp_avg_sq, scalars)
        param.copy_(round_stochastically(wide, key=update.rounding_key, start=update.start + here.start))
    _encode_moments(state, exp_avg, exp_avg_sq)


def _move(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: StepScalars) -> None:
    param.mul_(scalars.decay)
    exp_avg.mul_(scalars.beta1).add_(grad * scalars.grad_weight)
    exp_avg_sq.mul_(scalars.beta2).add_((grad * scalars.square_weight).mul_(grad))
    denominator = _root(exp_avg_sq).mul_(scalars.root_scale).add_(scalars.eps)
    param.sub_((exp_avg * scalars.step_size).div_(denominator))


def _root(values: Tensor) -> Tensor:
    """Take square roots, rounded correctly: torch's fp32 root on a CPU (MKL's) is an ulp off in one of five values.

    The fp64 root, rounded, is the correct fp32 root, as 53 bits are more than twice 24.
    """
    return values.double().sqrt().to(values.dtype)


def _refresh_master(master: Tensor, param: Tensor) -> None:
    """Take the parameter's value wherever the master no longer rounds to it.

    After every step the parameter is its master, rounded; a master that rounds to something else is either new (zeros)
    or out of date, because someone loaded, clamped or averaged the parameter in between. One comparison an element
    makes initialisation unnecessary and never lets an old master undo a load.
    """
    torch.where(master.to(param.dtype) == param, master, param.to(master.dtype), out=master)


def _decode_moments(state: AdamwState) -> tuple[Tensor, Tensor]:
    if state.exp_avg_absmax is None or state.exp_avg_sq_absmax is None:
        return state.exp_avg, state.exp_avg_sq
    return (
        _decode(state.exp_avg, state.exp_avg_absmax, dynamic_map(signed=True, device=state.exp_avg.device)),
        _decode(state.exp_avg_sq, state.exp_avg_sq_absmax, dynamic_map(signed=False, device=state.exp_avg.device)),
    )


def _decode(codes: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    return dequantize_blockwise(codes, absmax, levels, block_size=BLOCK_SIZE, dtype=torch.float32)


def _encode_moments(state: AdamwState, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    if state.exp_avg_absmax is None or state.exp_avg_sq_absmax is None:
        return
    finite = exp_avg.isfinite()
    exp_avg = torch.where(finite, exp_avg, 0)
    exp_avg_sq = torch.where(finite, exp_avg_sq.clamp(max=torch.finfo(torch.float32).max), 0)

    codes, absmax = quantize_blockwise(exp_avg, dynamic_map(signed=True), block_size=BLOCK_SIZE)
    state.exp_avg.copy_(codes)
    state.exp_avg_absmax.copy_(absmax)

    codes, absmax = quantize_blockwise(exp_avg_sq, dynamic_map(signed=False), block_size=BLOCK_SIZE)
    state.exp_avg_sq.copy_(torch.maximum(codes, (exp_avg_sq > 0).to(codes.dtype)))
    state.exp_avg_sq_absmax.copy_(absmax)
