"""The AdamW reference against torch, against the same rounding order written in NumPy, and in its settled corners."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from longfit.numerics.adamw import (
    BLOCK_SIZE,
    SLICE_NUMEL,
    AdamwState,
    AdamwUpdate,
    StepScalars,
    adamw_step,
    step_scalars,
)
from longfit.numerics.blockwise import nearest_codes
from longfit.numerics.codebooks import dynamic_map
from longfit.numerics.stochastic_rounding import round_stochastically

HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def new_state(numel: int, *, bits: int = 32, master: bool = False, dtype: torch.dtype = torch.float32) -> AdamwState:
    kept = torch.zeros(numel) if master else None
    if bits == 32:
        return AdamwState(torch.zeros(numel, dtype=dtype), torch.zeros(numel, dtype=dtype), master=kept)
    blocks = -(-numel // BLOCK_SIZE)
    codes = [torch.zeros(numel, dtype=torch.uint8) for _ in range(2)]
    return AdamwState(*codes, torch.zeros(blocks), torch.zeros(blocks), kept)


def step_in_numpy(param: np.ndarray, grad: np.ndarray, m: np.ndarray, v: np.ndarray, s: StepScalars) -> None:
    """The module's formulas, one IEEE rounding per operation, by a library whose square root is correctly rounded."""
    f = np.float32
    param[:] = param * f(s.decay)
    m[:] = f(s.beta1) * m + f(s.grad_weight) * grad
    v[:] = f(s.beta2) * v + (f(s.square_weight) * grad) * grad
    param[:] = param - (f(s.step_size) * m) / (np.sqrt(v) * f(s.root_scale) + f(s.eps))


def test_every_operation_is_one_rounding_in_the_order_that_is_written_down() -> None:
    param, state = torch.randn(5000), new_state(5000)
    expected, m, v = param.numpy().copy(), np.zeros(5000, np.float32), np.zeros(5000, np.float32)
    for step in range(1, 6):
        grad = torch.randn(5000) * 10 ** torch.randn(5000)
        scalars = step_scalars(step, **HYPER)
        adamw_step([AdamwUpdate(param, grad, state, scalars)])
        step_in_numpy(expected, grad.numpy(), m, v, scalars)
    np.testing.assert_array_equal(param.numpy(), expected)
    np.testing.assert_array_equal(state.exp_avg_sq.numpy(), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fifty_steps_equal_torch_within_rounding(dtype: torch.dtype) -> None:
    param = torch.randn(3000, dtype=dtype)
    peer = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.AdamW([peer], **HYPER)
    state = new_state(3000, dtype=dtype)
    for step in range(1, 51):
        grad = torch.randn(3000, dtype=dtype)
        peer.grad = grad.clone()
        optimizer.step()
        adamw_step([AdamwUpdate(param, grad, state, step_scalars(step, **HYPER))])
    # Per step: the parameter (below 8) rounds twice, half an ulp each, in either program; the update is at most
    # lr * 1 / sqrt(1 - beta2) = 32 lr and carries some ten roundings, relative.
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(param, peer.data, rtol=0, atol=50 * epsilon * (2 * 8 + 10 * 32 * HYPER["lr"]))


def test_a_16_bit_parameter_is_its_master_rounded_and_small_steps_add_up() -> None:
    param, state = torch.ones(300, dtype=torch.bfloat16), new_state(300, master=True)
    assert state.master is not None
    for step in range(1, 501):
        scalars = step_scalars(step, lr=2e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        adamw_step([AdamwUpdate(param, torch.ones(300, dtype=torch.bfloat16), state, scalars)])
        assert torch.equal(param, state.master.bfloat16())
    # A constant gradient moves by lr a step: 500 * 2e-5 = 0.01, of which bfloat16 alone would take none.
    torch.testing.assert_close(state.master, torch.full((300,), 0.99), rtol=0, atol=1e-4)


def test_a_parameter_changed_from_outside_wins_over_its_master() -> None:
    param, state = torch.ones(4, dtype=torch.float16), new_state(4, master=True)
    scalars = step_scalars(1, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    adamw_step([AdamwUpdate(param, torch.ones(4), state, scalars)])
    assert state.master is not None
    state.master[0] += 1e-4  # below half an ulp: the master's own digits, to be kept
    param[1] = 3.0
    adamw_step([AdamwUpdate(param, torch.ones(4), state, scalars)])
    assert state.master.tolist() == [pytest.approx(1.0001, abs=1e-7), 3.0, 1.0, 1.0]


def test_without_a_master_bfloat16_is_rounded_stochastically() -> None:
    param, state = torch.randn(700).bfloat16(), new_state(700)
    wide, moments = param.float(), new_state(700)
    grad, scalars = torch.randn(700), step_scalars(1, **HYPER)
    adamw_step([AdamwUpdate(param, grad, state, scalars, rounding_key=7, start=512)])
    adamw_step([AdamwUpdate(wide, grad, moments, scalars)])
    assert torch.equal(param, round_stochastically(wide, key=7, start=512))


def test_long_runs_are_the_same_whole_or_cut_between_blocks() -> None:
    numel = SLICE_NUMEL + 3 * BLOCK_SIZE + 17
    whole = torch.randn(numel)
    parts = whole.clone()
    grad, scalars = torch.randn(numel), step_scalars(1, **HYPER)
    state, cut = new_state(numel, bits=8), new_state(numel, bits=8)
    adamw_step([AdamwUpdate(whole, grad, state, scalars)])
    edges = [0, 2 * BLOCK_SIZE, 5 * BLOCK_SIZE, numel]
    runs = [slice(begin, end) for begin, end in pairwise(edges)]
    adamw_step([AdamwUpdate(parts[run], grad[run], cut.part(run), scalars) for run in runs])
    assert torch.equal(whole, parts)
    assert torch.equal(state.exp_avg_sq, cut.exp_avg_sq)
    assert torch.equal(absmax(state), absmax(cut))


def absmax(state: AdamwState) -> Tensor:
    assert state.exp_avg_absmax is not None
    assert state.exp_avg_sq_absmax is not None
    return torch.stack([state.exp_avg_absmax, state.exp_avg_sq_absmax])


def test_8_bit_moments_are_the_nearest_codes_and_a_positive_v_is_never_0() -> None:
    numel = 1000
    state, scalars = new_state(numel, bits=8), step_scalars(1, **HYPER)
    grad = torch.randn(numel) * torch.exp(4 * torch.randn(numel))
    grad[5], grad[6] = 0.0, 1e-18
    adamw_step([AdamwUpdate(torch.randn(numel), grad, state, scalars)])
    exact = new_state(numel)
    adamw_step([AdamwUpdate(torch.randn(numel), grad, exact, scalars)])

    m_scale, v_scale = (
        row.clamp(min=1e-38).reciprocal().repeat_interleave(BLOCK_SIZE)[:numel] for row in absmax(state)
    )
    assert torch.equal(state.exp_avg, nearest_codes(exact.exp_avg * m_scale, dynamic_map(signed=True)))
    nearest = nearest_codes(exact.exp_avg_sq * v_scale, dynamic_map(signed=False))
    differs = state.exp_avg_sq != nearest
    assert differs.any()
    assert torch.equal(differs, (nearest == 0) & (exact.exp_avg_sq > 0))
    assert set(state.exp_avg_sq[differs].tolist()) == {1}
    assert state.exp_avg_sq[5] == 0

    levels = dynamic_map(signed=True)[state.exp_avg.int()]
    assert not (levels * exact.exp_avg < 0).any(), "a first moment changed its sign"


def test_the_second_moment_keeps_small_values_beside_large_ones() -> None:
    numel = 1 << 16
    state = new_state(numel, bits=8)
    grad = torch.exp(2 * torch.randn(numel))  # v is log-normal with sigma 4
    adamw_step([AdamwUpdate(torch.zeros(numel), grad, state, step_scalars(1, **HYPER))])
    decoded = dynamic_map(signed=False)[state.exp_avg_sq.int()] * absmax(state)[1].repeat_interleave(BLOCK_SIZE)
    exact = (1 - HYPER["betas"][1]) * grad * grad
    assert ((decoded - exact).abs() / exact).median() < 0.10


def test_a_broken_gradient_spoils_its_own_weight_only() -> None:
    state, clean = new_state(600, bits=8), new_state(600, bits=8)
    param = torch.randn(600)
    expected, grad, scalars = param.clone(), torch.randn(600), step_scalars(1, **HYPER)
    broken = grad.clone()
    broken[3], broken[4], broken[300] = float("nan"), float("-inf"), 1e25  # the last one's square overflows
    grad[[3, 4]] = 0.0
    grad[300] = 0.0
    adamw_step([AdamwUpdate(param, broken, state, scalars)])
    adamw_step([AdamwUpdate(expected, grad, clean, scalars)])
    assert param[3].isnan()
    assert param[4].isnan()
    others = torch.ones(600, dtype=torch.bool)
    others[[3, 4, 300]] = False
    assert torch.equal(param[others], expected[others])
    assert torch.equal(state.exp_avg[:256], clean.exp_avg[:256]), "the block went on undisturbed"
    assert torch.equal(state.exp_avg_sq[:256], clean.exp_avg_sq[:256])
    assert absmax(state).isfinite().all()
    assert absmax(state)[1, 1] == torch.finfo(torch.float32).max


def test_an_empty_run_is_fine() -> None:
    adamw_step([AdamwUpdate(torch.empty(0), torch.empty(0), new_state(0), step_scalars(1, **HYPER))])
