"""The Triton AdamW kernel has the bits of the reference: interpreted here, compiled where a card is.

On a card the reference runs on the CPU, where its arithmetic is known to be rounded operation by operation.
"""

from dataclasses import replace

import pytest
import torch
from tests.kernels.same_bits import assert_same
from torch import Tensor

from longfit.numerics import adamw
from longfit.numerics.adamw import BLOCK_SIZE, AdamwState, AdamwUpdate, step_scalars
from longfit.numerics.codebooks import dynamic_map

pytest.importorskip("triton", reason="the package triton is missing; it comes with the dev extra on Linux")

from longfit.kernels.triton import adamw as triton_adamw

pytestmark = pytest.mark.usefixtures("poisoned")

HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
NUMELS = (1, 257, 2049)  # around a block, and around what a program steps
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


def new_state(numel: int, bits: int, master: bool) -> AdamwState:
    kept = torch.zeros(numel) if master else None
    if bits == 32:
        return AdamwState(torch.zeros(numel), torch.zeros(numel), master=kept)
    codes = [torch.zeros(numel, dtype=torch.uint8) for _ in range(2)]
    return AdamwState(*codes, *(torch.zeros(-(-numel // BLOCK_SIZE)) for _ in range(2)), kept)


def on(device: str, update: AdamwUpdate) -> AdamwUpdate:
    """A copy of an update elsewhere."""
    s = update.state
    kept = (s.exp_avg, s.exp_avg_sq, s.exp_avg_absmax, s.exp_avg_sq_absmax, s.master)
    state = AdamwState(*(None if x is None else x.to(device, copy=True) for x in kept))  # type: ignore[arg-type]
    return replace(update, param=update.param.to(device, copy=True), grad=update.grad.to(device), state=state)


def tensors(update: AdamwUpdate) -> list[Tensor]:
    s = update.state
    kept = (update.param, s.exp_avg, s.exp_avg_sq, s.exp_avg_absmax, s.exp_avg_sq_absmax, s.master)
    return [tensor for tensor in kept if tensor is not None]


def step_both(mine: list[AdamwUpdate], theirs: list[AdamwUpdate]) -> None:
    triton_adamw.adamw_step(mine)
    adamw.adamw_step(theirs)
    for a, b in zip(mine, theirs, strict=True):
        for x, y in zip(tensors(a), tensors(b), strict=True):
            assert_same(x, y)


def hard_gradient(numel: int, dtype: torch.dtype) -> Tensor:
    """Twelve decades, zeros, and in longer runs a NaN, an infinity and squares that overflow or vanish."""
    grad = torch.randn(numel) * 10 ** (3 * torch.randn(numel))
    grad[torch.rand(numel) < 0.1] = 0
    if numel > 60:
        grad[7], grad[20], grad[50], grad[51] = float("nan"), float("-inf"), -1e-30, 3e38
    return grad.to(dtype)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("param_dtype", "grad_dtype"), PAIRS)
def test_bits_of_the_reference(
    triton_device: str, bits: int, param_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    forms = {torch.float32: (False,), torch.bfloat16: (True, False), torch.float16: (True,)}[param_dtype]
    theirs = [
        AdamwUpdate(
            torch.linspace(-3, 3, numel).to(param_dtype), torch.empty(0), new_state(numel, bits, master),
            step_scalars(1, **HYPER), 0xDEADBEEF, (1 << 32) - 512,
        )
        for numel in NUMELS
        for master in forms
    ]  # fmt: skip
    mine = [on(triton_device, update) for update in theirs]
    for step in (1, 2):
        grads = [hard_gradient(update.param.numel(), grad_dtype) for update in theirs]
        scalars = step_scalars(step, **HYPER)
        mine = [replace(u, grad=g.to(triton_device), scalars=scalars) for u, g in zip(mine, grads, strict=True)]
        theirs = [replace(u, grad=g, scalars=scalars) for u, g in zip(theirs, grads, strict=True)]
        step_both(mine, theirs)  # all runs in one call, lengths and forms mixed


@pytest.mark.parametrize("signed", [True, False])
def test_every_threshold_of_the_8_bit_maps(triton_device: str, signed: bool) -> None:
    """Moments on each threshold and one ulp beside it, and far below; ties go to the lower code, v > 0 never to 0."""
    levels = dynamic_map(signed)
    middle = (levels[:-1] + levels[1:]) / 2
    values = torch.cat([middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0)), levels])
    values = torch.cat([values, torch.logspace(-44, 0, 200)])
    block = torch.ones(-(-values.numel() // 255), BLOCK_SIZE)  # absmax 1: values are scaled by exactly 1
    padded = torch.zeros(block.shape[0] * 255)
    padded[: values.numel()] = values
    block[:, 1:] = padded.view(-1, 255)
    moment = block.view(-1)
    grad = moment if signed else moment.sqrt()  # beta = 0 makes the moment the gradient (m), or its square (v)
    scalars = step_scalars(1, lr=0.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    theirs = AdamwUpdate(torch.ones_like(grad), grad, new_state(grad.numel(), 8, False), scalars)
    step_both([on(triton_device, theirs)], [theirs])


def test_many_runs_with_settings_of_their_own(triton_device: str) -> None:
    """More runs than one, each with its step and decay, some empty; float64 goes to the reference."""
    theirs = []
    for number in range(37):
        numel = (number * 397) % 1500
        wide = torch.float64 if number % 9 == 5 else torch.float32
        state = AdamwState(torch.zeros(numel, dtype=wide), torch.zeros(numel, dtype=wide))
        scalars = step_scalars(1 + number, lr=1e-3 * number, betas=(0.9, 0.95), eps=1e-6, weight_decay=number / 40)
        theirs.append(AdamwUpdate(torch.randn(numel, dtype=wide), torch.randn(numel, dtype=wide), state, scalars))
    step_both([on(triton_device, update) for update in theirs], theirs)
    triton_adamw.adamw_step([])


def test_a_loaded_parameter_wins_over_its_master(triton_device: str) -> None:
    theirs = AdamwUpdate(
        torch.randn(300).bfloat16(), torch.randn(300), new_state(300, 32, True), step_scalars(1, **HYPER)
    )
    mine = on(triton_device, theirs)
    step_both([mine], [theirs])
    for update in (mine, theirs):
        update.param[100:200] = 0.75
        update.param[250] = float("nan")
    step_both([mine], [theirs])
