"""C++ norm, gated product and cross-entropy: elementwise bounds against float64, special values, threads, refusals.

Every instruction set that this machine runs, in every dtype.
"""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longfit.kernels.cpu import elementwise as cpu_elementwise
from longfit.kernels.cpu.elementwise import (
    cross_entropy_,
    rms_norm_backward,
    rms_norm_forward,
    swiglu_backward,
    swiglu_forward,
)

UNSUPPORTED = cpu_elementwise.supported()
pytestmark = [
    pytest.mark.skipif(UNSUPPORTED is not None, reason=f"C++ elementwise kernels: {UNSUPPORTED}"),
    pytest.mark.usefixtures("isa"),
]

# Half a unit in the last place, relative; and what subnormal results of a dtype may lose beside it.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FLUSHED = {torch.bfloat16: 1e-30, torch.float16: 2.0**-24, torch.float32: 1e-30}
U32 = UNIT[torch.float32]
DTYPES = pytest.mark.parametrize("dtype", UNIT, ids=lambda dtype: str(dtype).removeprefix("torch."))
SHAPES = [(1, 1), (3, 15), (2, 3, 17), (5, 576), (1, 1000), (0, 8), (64, 33), (130, 31)]


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, each row of another magnitude."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (values * scale * torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64).exp()).to(dtype)


def assert_within(got: Tensor, exact: Tensor, bound: Tensor) -> None:
    excess = (got.double() - exact).abs() - bound
    assert (excess <= 0).all(), excess.max()  # of a NaN this is False


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_its_gradient(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad = random(*shape, seed=1, scale=3.0, dtype=dtype), random(*shape, seed=2, dtype=dtype)
    weight, unit, flushed = random(shape[-1], seed=3, dtype=dtype), UNIT[dtype], FLUSHED[dtype]
    eps = 1e-5
    out, inverse_rms = rms_norm_forward(x, weight, eps=eps)
    grad_x, grad_weight = rms_norm_backward(grad, x, weight, inverse_rms, trains=True)
    alone, nothing = rms_norm_backward(grad, x, weight, inverse_rms)
    assert torch.equal(grad_x, alone) and nothing is None and grad_weight is not None  # noqa: PT018
    leaf, scale = x.double().requires_grad_(), weight.double().requires_grad_()
    factor = torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + eps)
    exact = scale * leaf * factor
    exact_grad, exact_weight = torch.autograd.grad(exact, (leaf, scale), grad.double())
    exact, factor = exact.detach(), factor.detach()
    lanes = 32 if isa.startswith("avx512") else 8  # partial sums of a float32 sum: two vectors of 16, 8 or 4
    slack = (5 + shape[-1] / lanes) * U32  # of the sum, its root, its quotient and their product
    assert_within(out, exact, exact.abs() * (2 * unit + unit**2 + slack) + flushed)
    # h = w dy is rounded before its two uses, and the result once more.
    h = (weight.double() * grad.double()).abs()
    sizes = h * factor + x.double().abs() * factor**3 * (h * x.double().abs()).mean(-1, keepdim=True)
    assert_within(grad_x, exact_grad, sizes * (2 * unit + unit**2 + 4 * slack) + 2 * flushed)
    # x / rms is rounded once, dy times it and their sums over the rows only to float32.
    rows = x.numel() // shape[-1]
    terms = (grad.double() * x.double() * factor).abs().flatten(0, -2).sum(0)
    assert grad_weight.dtype == torch.float32
    assert_within(grad_weight, exact_weight, terms * (unit + slack + (2 + rows) * U32) + rows * flushed)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_product_and_its_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    unit, flushed = UNIT[dtype], FLUSHED[dtype]
    gate, up, grad = (
        random(*shape, seed=seed, scale=scale, dtype=dtype) for seed, scale in ((1, 6.0), (2, 1.0), (3, 1.0))
    )
    got = swiglu_forward(gate, up), *swiglu_backward(grad, gate, up)
    leaves = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = F.silu(leaves[0]) * leaves[1]
    exact_gate, exact_up = torch.autograd.grad(exact, leaves, grad.double())
    roundings = 2 * unit + unit**2 + 16 * U32  # silu, or dy u, then the product; the exponential is good to a few U32
    # what is lost of silu or dy u where it is subnormal is multiplied on
    most = max((1 + x.double().abs().max()).item() if x.numel() else 1.0 for x in (gate, up, grad))
    assert_within(got[0], exact.detach(), exact.detach().abs() * roundings + most * flushed)
    assert_within(got[2], exact_up, exact_up.abs() * roundings + most * flushed)
    # The slope s (1 + g (1 - s)) passes through zero: its error is that of its two terms.
    s = torch.sigmoid(gate.double())
    terms = s * (1 + (gate.double() * (1 - s)).abs()) * (grad.double() * up.double()).abs()
    assert_within(got[1], exact_gate, exact_gate.abs() * roundings + 16 * U32 * terms + 2 * most * flushed)


@DTYPES
def test_gated_product_of_special_values(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = [0.0, -0.0, 1e-3, 88.5, 90.0, -88.5, -90.0, largest, -largest, torch.inf, -torch.inf, torch.nan]
    gate = torch.tensor(values).to(dtype)
    up = torch.ones_like(gate)
    # torch's exponential errs by a few units, too
    options = {"rtol": 16 * U32 + 2 * UNIT[dtype], "atol": FLUSHED[dtype], "equal_nan": True}
    torch.testing.assert_close(swiglu_forward(gate, up), F.silu(gate) * up, **options)


@pytest.mark.parametrize(("rows", "words"), [(1, 1), (3, 15), (4, 33), (5, 1000), (2, 10007)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@DTYPES
def test_cross_entropy_and_its_gradient(isa: str, rows: int, words: int, scale: float, dtype: torch.dtype) -> None:
    logits, factor = random(rows, words, seed=words, scale=scale, dtype=dtype), 1 / 512
    labels = torch.randint(0, words, (rows,), generator=torch.Generator().manual_seed(5))
    exact = logits.double()
    losses = F.cross_entropy(exact, labels, reduction="none")
    gradient = (exact.softmax(1) - F.one_hot(labels, words)) * factor
    got = logits.clone()
    got_losses = cross_entropy_(got, labels, factor=factor)
    # Of an exponential: three roundings of its own and that of x - largest; of the sum: nine additions of a run, the
    # two sides of what is compensated, and two roundings of the result. It does not grow with the number of words.
    relative = (16 + (exact.amax(1) - exact.amin(1))) * U32
    assert_within(got_losses, losses, relative + 4 * U32 * (exact.abs().amax(1) + losses))
    probabilities = exact.softmax(1) + F.one_hot(labels, words)
    assert_within(
        got, gradient, gradient.abs() * UNIT[dtype] + 4 * factor * relative[:, None] * probabilities + FLUSHED[dtype]
    )


def test_a_large_vocabulary_loses_no_probability() -> None:
    """Words of 2^-25.5 each vanish beside likely ones where they are added one by one, and here they are 1.6 %."""
    words, rare = 3 * 2**18, -25.5 * math.log(2)
    logits = torch.full((2, words), rare)
    logits[0, 0] = logits[1, -1] = 0.0
    labels, exact = torch.tensor([0, 0]), logits.double()
    losses = F.cross_entropy(exact, labels, reduction="none")
    got = logits.clone()
    got_losses = cross_entropy_(got, labels, factor=1.0)
    relative = (16 - rare) * U32  # of the sum, as above
    assert_within(got_losses, losses, relative + 4 * U32 * losses)
    assert_within(got, exact.softmax(1) - F.one_hot(labels, words), 2 * relative * exact.softmax(1) + 2 * U32)


@DTYPES
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    x, weight = random(700, 576, seed=1, dtype=dtype), random(576, seed=2, dtype=dtype)
    labels = torch.arange(700) % 576
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            out, inverse_rms = rms_norm_forward(x, weight, eps=1e-6)
            logits = x.clone()
            losses = cross_entropy_(logits, labels, factor=0.5)
            grad, grad_weight = rms_norm_backward(out, x, weight, inverse_rms, trains=True)
            results.append(
                (out, grad, grad_weight, swiglu_forward(x, out), *swiglu_backward(x, out, grad), logits, losses)
            )
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_tensors_are_read_as_they_are_meant() -> None:
    wide, weight = random(6, 40, seed=1), random(20, seed=2)
    for x in (wide[:, ::2], wide[:, 3:23], wide.t()[:20, :6].t()):
        expected = rms_norm_forward(x.contiguous(), weight, eps=1e-6)[0]
        assert torch.equal(rms_norm_forward(x, weight, eps=1e-6)[0], expected)
        assert torch.equal(swiglu_forward(x, x), swiglu_forward(x.contiguous(), x.contiguous()))


def test_what_does_not_fit_is_refused() -> None:
    x = random(4, 8, seed=1)
    with pytest.raises(ValueError, match=r"must be one shape in one of torch.float32"):
        swiglu_forward(x, x[:3])
    with pytest.raises(ValueError, match=r"float64"):
        swiglu_forward(x.double(), x.double())
    with pytest.raises(ValueError, match=r"bfloat16"):
        swiglu_forward(x, x.bfloat16())
    with pytest.raises(ValueError, match=r"weight \[4\]"):
        rms_norm_forward(x, x[:, 0], eps=1e-6)
    with pytest.raises(ValueError, match=r"labels \[3\]"):
        cross_entropy_(x, torch.zeros(3, dtype=torch.int64), factor=1.0)
    with pytest.raises(ValueError, match=r"dense"):
        cross_entropy_(x.t(), torch.zeros(8, dtype=torch.int64), factor=1.0)
