"""The C++ AdamW kernel has the bits of the reference, for every instruction set that this processor has."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from longfit.kernels.cpu import adamw as cpu_adamw
from longfit.kernels.cpu import library as cpu_library
from longfit.numerics import adamw
from longfit.numerics.adamw import BLOCK_SIZE, AdamwState, AdamwUpdate, step_scalars
from longfit.numerics.codebooks import dynamic_map

pytestmark = pytest.mark.skipif(
    cpu_library.unavailable() is not None, reason=f"no C++ library: {cpu_library.unavailable()}"
)

ISAS = cpu_library.library().isas if cpu_library.unavailable() is None else ()
HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Around a block, around the 64 codes of a vector, around a chunk of 2,048, more than a thread's task of 16,384.
NUMELS = (1, 63, 255, 257, 2049, 33_000)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu_library.library().isa
    cpu_library.library().isa = request.param
    yield request.param
    cpu_library.library().isa = before


def new_state(numel: int, bits: int, master: bool) -> AdamwState:
    kept = torch.zeros(numel) if master else None
    if bits == 32:
        return AdamwState(torch.zeros(numel), torch.zeros(numel), master=kept)
    codes = [torch.zeros(numel, dtype=torch.uint8) for _ in range(2)]
    return AdamwState(*codes, *(torch.zeros(-(-numel // BLOCK_SIZE)) for _ in range(2)), kept)


def bits_of(tensor: Tensor) -> Tensor:
    """The bytes, with every NaN the same: its payload is not part of the contract."""
    return (torch.where(tensor.isnan(), float("nan"), tensor) if tensor.is_floating_point() else tensor).view(
        torch.uint8
    )


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(bits_of(a), bits_of(b))


def tensors(update: AdamwUpdate) -> list[Tensor]:
    s = update.state
    kept = (update.param, s.exp_avg, s.exp_avg_sq, s.exp_avg_absmax, s.exp_avg_sq_absmax, s.master)
    return [tensor for tensor in kept if tensor is not None]


def hard_gradient(numel: int, dtype: torch.dtype) -> Tensor:
    """Twelve decades, zeros, and in longer runs a NaN, an infinity and squares that overflow or vanish."""
    grad = torch.randn(numel) * 10 ** (3 * torch.randn(numel))
    grad[torch.rand(numel) < 0.1] = 0
    if numel > 60:
        grad[7], grad[20], grad[50], grad[51] = float("nan"), float("-inf"), -1e-30, 3e38
    return grad.to(dtype)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("param_dtype", "grad_dtype"), list(itertools.product(FLOATS, FLOATS)))
def test_bits_of_the_reference(isa: str, bits: int, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    forms = {torch.float32: (False,), torch.bfloat16: (True, False), torch.float16: (True,)}[param_dtype]
    mine, theirs = (
        [
            (torch.linspace(-3, 3, numel).to(param_dtype), new_state(numel, bits, master))
            for numel in NUMELS
            for master in forms
        ]
        for _ in range(2)
    )
    for step in range(1, 4):
        grads = [hard_gradient(param.numel(), grad_dtype) for param, _ in mine]
        scalars = step_scalars(step, **HYPER)
        updates, expected = (
            [AdamwUpdate(p, g, s, scalars, 0xDEADBEEF, 512) for (p, s), g in zip(side, grads, strict=True)]
            for side in (mine, theirs)
        )
        cpu_adamw.adamw_step(updates)  # all runs in one call, lengths mixed
        for update, reference in zip(updates, expected, strict=True):
            adamw.adamw_step([reference])
            assert_same(tensors(update), tensors(reference))


def test_every_threshold_of_the_8_bit_maps(isa: str) -> None:
    """Moments on each threshold of both maps and one ulp beside it, all magnitudes below; ties go to the lower code."""
    for signed in (True, False):
        levels = dynamic_map(signed)
        middle = (levels[:-1] + levels[1:]) / 2
        values = torch.cat([middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0)), levels])
        values = torch.cat([values, values * 1e-3, torch.logspace(-44, 0, 500)])
        if signed:
            values = torch.cat([values, -values])
        block = torch.ones(-(-values.numel() // 255), BLOCK_SIZE)  # each block has absmax 1: values are scaled by 1
        padded = torch.zeros(block.shape[0] * 255)
        padded[: values.numel()] = values
        block[:, 1:] = padded.view(-1, 255)
        moment = block.view(-1)
        # beta = 0 makes the moment the gradient (m), or its square (v).
        grad = moment if signed else moment.sqrt()
        scalars = step_scalars(1, lr=0.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
        mine, theirs = (
            AdamwUpdate(torch.ones_like(grad), grad, new_state(grad.numel(), 8, False), scalars) for _ in "ab"
        )
        cpu_adamw.adamw_step([mine])
        adamw.adamw_step([theirs])
        assert_same(tensors(mine), tensors(theirs))


def test_the_number_of_threads_does_not_matter() -> None:
    grad = torch.randn(100_000)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        update = AdamwUpdate(torch.ones(100_000), grad, new_state(100_000, 8, False), step_scalars(1, **HYPER))
        cpu_adamw.adamw_step([update])
        results.append(tensors(update))
    assert_same(*results)


def test_float64_parameters_and_gradients() -> None:
    wide = AdamwState(torch.zeros(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64))
    scalars = step_scalars(1, **HYPER)
    exact = torch.ones(9, dtype=torch.float64)
    rounded = torch.ones(9)
    grad = torch.linspace(-1, 1, 9, dtype=torch.float64)
    updates = [AdamwUpdate(exact, grad, wide, scalars), AdamwUpdate(rounded, grad, new_state(9, 32, False), scalars)]
    cpu_adamw.adamw_step(updates)
    torch.testing.assert_close(rounded, exact.float(), rtol=1e-6, atol=0)
    assert not torch.equal(exact, rounded.double()), "float64 stays float64"
