"""One run of elements through the AdamW update, without temporaries longer than the cache.

The reference makes temporaries as long as what it is given; here it is given slices, so that a page of any size costs
the same scratch memory. Slices begin at multiples of 256 elements, as 8-bit blocks must.
"""

from torch import Tensor

from longfit.numerics.adamw import BLOCK_SIZE, RunState, StepScalars, adamw_run

SLICE = 1 << 16  # elements; the five float32 temporaries of a slice fill 1.3 MiB, a second-level cache


def update_run(
    param: Tensor, grad: Tensor, state: RunState, scalars: StepScalars, *, rounding_key: int, start: int
) -> None:
    """Do ``adamw_run`` slice by slice; arguments as there."""
    for begin in range(0, param.numel(), SLICE):
        end = min(begin + SLICE, param.numel())
        here = slice(begin, end)
        blocks = slice(begin // BLOCK_SIZE, -(-end // BLOCK_SIZE))
        part = RunState(
            exp_avg=state.exp_avg[here],
            exp_avg_sq=state.exp_avg_sq[here],
            exp_avg_absmax=None if state.exp_avg_absmax is None else state.exp_avg_absmax[blocks],
            exp_avg_sq_absmax=None if state.exp_avg_sq_absmax is None else state.exp_avg_sq_absmax[blocks],
            master=None if state.master is None else state.master[here],
        )
        adamw_run(param[here], grad[here], part, scalars, rounding_key=rounding_key, start=start + begin)
