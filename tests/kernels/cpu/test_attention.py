"""C++ tile attention: elementwise bounds against float64, torch's own error, schedules, strides, threads, refusals.

Every instruction set that this machine runs, and of each the dtypes that take another path through it.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from longfit.attention.backends import tile_backward, tile_forward
from longfit.attention.tile import QueryTile
from longfit.attention.visibility import Schedule, build_schedule, document_starts
from longfit.kernels.cpu import attention as cpu_attention
from longfit.kernels.cpu.attention import attention_backward, attention_forward

# Half a unit in the last place, relative; and what subnormal results of a dtype may lose beside it.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
U32 = UNIT[torch.float32]
FLUSHED = {torch.bfloat16: 1e-30, torch.float16: 2.0**-25, torch.float32: 1e-30}

PATHS = [
    *((isa, torch.float32) for isa in ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16", "neon")),
    *((isa, torch.bfloat16) for isa in ("scalar", "avx2", "avx512_bf16", "amx_bf16", "neon")),
    *((isa, torch.float16) for isa in ("avx2", "avx512", "neon")),
]


@pytest.fixture(params=PATHS, ids=lambda path: f"{path[0]}-{str(path[1]).removeprefix('torch.')}")
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """A dtype, with the instruction set of its path in use."""
    isa, dtype = request.param
    if cpu_attention.supported() is not None:
        pytest.skip(cpu_attention.supported() or "")
    library = cpu_attention.library()
    if isa not in library.isas:
        pytest.skip(f"this processor and build have {', '.join(library.isas)}")
    before, library.isa = library.isa, isa
    yield dtype
    library.isa = before


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    first_key: Tensor
    head_bounds: tuple[int, ...]
    start: int
    scaling: float

    @property
    def options(self) -> dict[str, float]:
        return {"start": self.start, "scaling": self.scaling}

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        out, lse = attention_forward(self.q, self.k, self.v, self.first_key, self.head_bounds, **self.options)
        grad_k, grad_v = (torch.zeros(self.k.shape) for _ in range(2))
        grad_q = attention_backward(
            self.grad_out, self.q, self.k, self.v, out, lse, self.first_key, self.head_bounds,
            **self.options, grad_k=grad_k, grad_v=grad_v,
        )  # fmt: skip
        return out, lse, grad_q, grad_k, grad_v

    def visible(self) -> Tensor:
        """bool [B, H, t, n]."""
        keys = torch.arange(self.k.shape[2])
        queries = torch.arange(self.q.shape[2]) + self.start
        heads = torch.tensor(self.head_bounds).diff()
        first = self.first_key.repeat_interleave(heads, dim=0).transpose(0, 1)  # [B, H, t]
        return (keys >= first[..., None]) & (keys <= queries[:, None])


def problem(
    *, heads=(9, 3), head_dim=64, start=0, queries=130, batch=1, group=None, window=None, documents=(),
    magnitude=1.0, scaling=None, dtype=torch.float32,
) -> Problem:  # fmt: skip
    """Tensors are strided views of [B, T, H, D] memory with NaN between their rows."""
    total = start + queries

    def rows(num_heads: int, count: int) -> Tensor:
        memory = torch.full((batch, count, num_heads, head_dim + 7), torch.nan)
        memory[..., 3 : 3 + head_dim] = torch.randn(batch, count, num_heads, head_dim)
        return memory.to(dtype)[..., 3 : 3 + head_dim].transpose(1, 2)

    positions = None
    if documents:
        positions = torch.cat([torch.arange(length) for length in documents])[None, :total].expand(batch, -1)
    starts = document_starts(batch, total, position_ids=positions)
    schedule = build_schedule(heads[0], starts, group_size=group, sliding_window=window)
    first_key = schedule.first_key[:, :, start:]
    return Problem(
        q=rows(heads[0], queries).mul_(magnitude), k=rows(heads[1], total), v=rows(heads[1], total),
        grad_out=rows(heads[0], queries), first_key=first_key, head_bounds=schedule.head_bounds,
        start=start, scaling=head_dim**-0.5 if scaling is None else scaling,
    )  # fmt: skip


def check_against_float64(p: Problem) -> None:
    """Every element lies within its own bound, derived here from what the kernel rounds and to what.

    Let e be the relative error of a probability before it is rounded to anything but float32: a score is a sum of D
    products in float32, each partial sum at most |q| |k| scaling, of a query that was multiplied by the scaling; the
    exponential errs by 2 U32 (common/vec.h), and the log-sum-exp adds a rounding of itself and of n terms. Where bf16
    meets in bf16 products, P is rounded for P V (the sum of its exponentials is not) and dS for its two products:
    that is ``inner``. out and dQ are rounded to the dtype of the tensors, ``outer``; delta is taken from the rounded
    out. float32 sums over keys or queries err by at most their number of terms times U32, relative to the sum of
    magnitudes. Probabilities below 2^-126 become 0: that moves no result here by FLUSHED.
    """
    out, lse, grad_q, grad_k, grad_v = p.run()
    flushed, dtype = FLUSHED[p.q.dtype], p.q.dtype
    rounds = dtype == torch.bfloat16 and cpu_attention.multiplies_bf16()
    repeats = p.q.shape[1] // p.k.shape[1]
    q, k, v, grad = (x.double() for x in (p.q, p.k, p.v, p.grad_out))
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))  # [B, H, n, D]
    scores = (q @ k.mT * p.scaling).masked_fill(~p.visible(), -torch.inf)
    exact_lse = scores.logsumexp(-1)
    probs = (scores - exact_lse[..., None]).exp()  # [B, H, t, n]
    exact = probs @ v

    # 8 more: a product's own rounding where it is not fused, those of the scaled query, the exponential, its argument
    most, terms = (q.abs() @ k.abs().mT).max().item() * abs(p.scaling), k.shape[2] + q.shape[2] + q.shape[3] + 8
    e = terms * U32 * (1 + most)
    assert e < 0.1, "the case is too extreme for a bound of first order"
    # of second order, and of float32: less than 5 % of the first
    inner, outer = 1.05 * ((UNIT[dtype] if rounds else 0) + 2 * e), 1.05 * (UNIT[dtype] + 2 * e)
    out_bound = inner * (probs @ v.abs()) + outer * exact.abs() + flushed
    assert ((lse - exact_lse).abs() <= e).all()
    assert ((out - exact).abs() <= out_bound).all()

    delta = (grad * exact).sum(-1, keepdim=True)
    grad_p = grad @ v.mT
    grad_s = probs * (grad_p - delta)
    delta_error = (grad.abs() * out_bound).sum(-1, keepdim=True) + terms * U32 * (grad.abs() @ v.abs().mT + delta.abs())
    s_bound = inner * grad_s.abs() + 1.05 * probs * delta_error

    def kv_heads(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, repeats)).sum(2)

    scale = abs(p.scaling)
    exact_q, exact_k, exact_v = grad_s @ k * p.scaling, kv_heads(grad_s.mT @ q) * p.scaling, kv_heads(probs.mT @ grad)
    q_bound = scale * (s_bound @ k.abs() + terms * U32 * grad_s.abs() @ k.abs()) + outer * exact_q.abs()
    k_bound = scale * kv_heads(s_bound.mT @ q.abs() + terms * U32 * grad_s.abs().mT @ q.abs())
    v_bound = kv_heads(inner * probs.mT @ grad.abs())
    assert ((grad_q - exact_q).abs() <= q_bound + flushed).all()
    assert ((grad_k - exact_k).abs() <= k_bound + FLUSHED[torch.float32]).all()
    assert ((grad_v - exact_v).abs() <= v_bound + FLUSHED[torch.float32]).all()


SHAPES = [
    *({"queries": t, "start": s} for t, s in ((1, 0), (1, 77), (63, 0), (65, 1), (130, 126), (257, 300))),
    *({"head_dim": d, "heads": (4, 2), "start": 40} for d in (16, 32, 40, 80, 96, 128, 256)),
    *({"heads": h, "queries": 70, "start": 3} for h in ((8, 1), (6, 2), (5, 5))),
]
SCHEDULES = [
    {"group": 64, "start": 200},
    {"group": 50, "queries": 301, "heads": (8, 1)},
    {"window": 1},
    {"window": 17, "start": 150},
    {"window": 129, "start": 129, "queries": 200},
    {"documents": (100, 3, 1, 60, 200), "start": 90, "queries": 200, "batch": 2},
    {"documents": (90, 100, 200), "group": 32, "queries": 260, "heads": (6, 2)},
]


@pytest.mark.parametrize("case", [*SHAPES, *SCHEDULES], ids=str)
def test_every_element_within_its_bound_of_float64(dtype: torch.dtype, case: dict) -> None:
    case = {"batch": 2, **case} if case.get("queries", 130) < 100 else case
    check_against_float64(problem(**case, dtype=dtype))


@pytest.mark.parametrize("hidden", [1, 2, 127, 129])
def test_keys_hidden_from_the_last_query_alone(dtype: torch.dtype, hidden: int) -> None:
    p = problem(queries=64, start=200, heads=(2, 1), dtype=dtype)
    p.first_key = p.first_key.clone()
    p.first_key[..., -1] = hidden
    check_against_float64(p)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_number_of_threads(dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    check_against_float64(problem(queries=400, start=100, batch=2, heads=(6, 2), dtype=dtype))


def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(queries=300, start=1000, heads=(6, 2), group=128, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(p.run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "case", [{"scaling": -0.2}, {"scaling": 0.0}, {"magnitude": 100.0}, {"magnitude": 1e-30}], ids=str
)
def test_any_scaling_and_extreme_scores(dtype: torch.dtype, case: dict) -> None:
    check_against_float64(problem(start=200, heads=(2, 1), dtype=dtype, **case))


def test_scores_of_a_million_pick_one_key_without_overflow(dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        pytest.skip("float16 ends at 65,504")
    p = problem(start=300, heads=(2, 1), magnitude=1e6, dtype=dtype)
    out, lse, *grads = p.run()
    scores = (p.q.double() @ p.k.double().mT * p.scaling).masked_fill(~p.visible(), -torch.inf)
    best, second = scores.topk(2).values.unbind(-1)
    clear = best - second > 100  # fp32 scores of this size are good to about 1
    assert clear.float().mean() > 0.99
    picked = p.v.expand(-1, 2, -1, -1).gather(2, scores.argmax(-1, keepdim=True).expand(-1, -1, -1, 64))
    assert ((out - picked).abs() <= 2 * UNIT[dtype] * picked.abs())[clear].all()  # P and out are rounded
    assert torch.allclose(lse.double(), best, rtol=1e-6)
    assert all(x.isfinite().all() for x in grads)


def test_growing_scores_move_the_reference_in_every_block(dtype: torch.dtype) -> None:
    p = problem(start=900, queries=100, heads=(2, 1), dtype=dtype)
    p.k = (p.k * 0 + torch.arange(1, 1001)[:, None] / 16).to(dtype)  # each block outgrows the one before it by 2^11
    p.q = (p.q * 0 + torch.tensor([1.0, 0.0] * 32)).to(dtype)
    check_against_float64(p)


def test_a_nan_key_is_seen_by_its_queries_and_no_other(dtype: torch.dtype) -> None:
    p = problem(start=200, window=40, heads=(2, 1), dtype=dtype)
    clean = p.run()
    p.k[:, :, 250] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # NaN, every bit of it set
    out, lse, grad_q, _, _ = p.run()
    sees = p.visible()[..., 250]  # [B, H, t]
    for got, expected in ((out, clean[0]), (lse, clean[1])):
        assert got[sees].isnan().all()
        assert torch.equal(got[~sees], expected[~sees])
    assert grad_q[sees].isnan().all()  # dQ = dS K also reaches others, by 0 times NaN, as in any product


def test_gradients_are_added_into_strided_sums(dtype: torch.dtype) -> None:
    p = problem(start=70, dtype=dtype)
    _, _, grad_q, grad_k, grad_v = p.run()
    out, lse = attention_forward(p.q, p.k, p.v, p.first_key, p.head_bounds, **p.options)
    sums = torch.full((2, 1, 200, 3, 100), 2.0)
    views = [x[..., 5:69].transpose(1, 2) for x in sums]
    again = attention_backward(
        p.grad_out, p.q, p.k, p.v, out, lse, p.first_key, p.head_bounds, **p.options, grad_k=views[0], grad_v=views[1]
    )
    assert torch.equal(again, grad_q)
    assert torch.equal(views[0], grad_k + 2)
    assert torch.equal(views[1], grad_v + 2)
    sums[..., 5:69] = 2.0
    assert (sums == 2).all()  # nothing beside the views was touched


def test_expanded_and_column_strided_inputs(dtype: torch.dtype) -> None:
    p = problem(start=10, queries=40, heads=(4, 2), batch=2, dtype=dtype)
    dense = Problem(p.q, p.k, p.v, torch.ones(p.q.shape, dtype=dtype), p.first_key, p.head_bounds, p.start, p.scaling)
    q_columns = p.q.mT.contiguous().mT
    strided = Problem(
        q_columns,
        p.k,
        p.v,
        torch.ones((), dtype=dtype).expand(p.q.shape),
        p.first_key,
        p.head_bounds,
        p.start,
        p.scaling,
    )
    for a, b in zip(dense.run(), strided.run(), strict=True):
        assert torch.equal(a, b)


def test_same_bits_from_concurrent_python_threads(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    problems = [problem(start=200, queries=130 + 10 * i, group=128 if i % 2 else None, dtype=dtype) for i in range(4)]
    alone = [p.run() for p in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(Problem.run, problems * 2))
    for got, expected in zip(together, alone * 2, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_errs_no_more_than_torch_does(dtype: torch.dtype, head_dim: int) -> None:
    # 512 divides both, so that torch needs no merge
    p = problem(start=512, queries=512, heads=(4, 4), head_dim=head_dim, dtype=dtype)
    flash, flash_backward = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    p.start, p.k, p.v = 0, p.k[:, :, :512], p.v[:, :, :512]
    out, _, grad_q, grad_k, grad_v = p.run()
    torch_out, torch_lse = flash(p.q, p.k, p.v, 0.0, True, scale=p.scaling)
    torch_grads = flash_backward(p.grad_out, p.q, p.k, p.v, torch_out, torch_lse, 0.0, True, scale=p.scaling)
    q, k, v = (x.double().requires_grad_() for x in (p.q, p.k, p.v))
    scores = (q @ k.mT * p.scaling).masked_fill(~p.visible(), -torch.inf)
    exact = scores.softmax(-1) @ v
    exact.backward(p.grad_out.double())
    ours, theirs = (out, grad_q, grad_k, grad_v), (torch_out, *torch_grads)
    variance = 2 if dtype == torch.float32 else 1
    for mine, other, reference in zip(ours, theirs, (exact, q.grad, k.grad, v.grad), strict=True):
        # Root mean squares of 1e5 independent roundings: equal algorithms differ by far less than 5 %. In float32
        # a probability has twice the roundings of torch's at most (the scaled query, its log-sum-exp in powers of two,
        # an exponential good to two units), so that the variance doubles.
        assert (mine - reference).norm() <= 1.05 * variance**0.5 * (other - reference).norm()


def test_the_engine_finds_it_and_agrees_with_the_reference(dtype: torch.dtype) -> None:
    p = problem(start=130, queries=190, heads=(6, 2), group=64, batch=2, dtype=dtype)
    schedule = Schedule(
        torch.nn.functional.pad(p.first_key, (p.start, 0)),  # of the whole sequence
        p.head_bounds,
    )
    tile = QueryTile(p.q, p.k, p.v, schedule, p.start, p.scaling)
    results = {}
    for name in ("cpu", "reference", None):
        out, lse = tile_forward(tile, backend=name)
        grads = [torch.zeros(p.k.shape) for _ in range(2)]
        grad_q = tile_backward(tile, p.grad_out, out, lse, grad_k=grads[0], grad_v=grads[1], backend=name)
        results[name] = (out, lse, grad_q, *grads)
    for ours, reference, chosen in zip(*results.values(), strict=True):
        assert torch.equal(ours, chosen)
        # A root mean square of three independent roundings (P or dS, delta, the result), each at most a unit; in
        # float32 of sums of 64 products and up to 320 keys on both sides: random walks of sqrt(320) roundings.
        units = 3 if dtype != torch.float32 else 3 + 2 * 18
        assert (ours - reference).norm() <= units * UNIT[dtype] * reference.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 9, 5, 64).double()}, "torch.float32, torch.bfloat16, torch.float16 on the CPU"),
        ({"k": torch.zeros(1, 3, 5, 64).bfloat16()}, "torch.float32, torch.bfloat16, torch.float16 on the CPU"),
        ({"q": torch.zeros(1, 8, 5, 64)}, "a multiple of K"),
        ({"head_bounds": (0, 4)}, "must rise from 0 to the 9 query heads"),
        ({"first_key": torch.zeros(1, 1, 5)}, r"must be \[1, 1, 5\] in torch.int32"),
        ({"first_key": torch.tensor([[[0, 1, 0, 1, 1]]], dtype=torch.int32)}, "never decrease"),
        ({"first_key": torch.full((1, 1, 5), 4, dtype=torch.int32)}, "show each query itself"),
        ({"start": 4}, "do not see themselves"),
        ({"start": -1}, "do not see themselves"),
        ({"first_key": torch.full((1, 1, 5), -1, dtype=torch.int32)}, "no key before the first"),
    ],
    ids=str,
)
def test_refusals_say_what_is_wrong(change: dict, message: str) -> None:
    p = problem(queries=5)
    for name, value in change.items():
        setattr(p, name, value)
    with pytest.raises(ValueError, match=message):
        attention_forward(p.q, p.k, p.v, p.first_key, p.head_bounds, **p.options)


def test_backward_refuses_gradients_of_another_shape_or_dtype() -> None:
    p = problem(queries=5)
    lse, sums = torch.zeros(1, 9, 5), torch.zeros(p.k.shape)
    for wrong, name in (({"grad_k": sums.bfloat16()}, "grad_k"), ({"grad_v": sums[:, :, :4]}, "grad_v")):
        with pytest.raises(ValueError, match=f"{name}: got"):
            attention_backward(
                p.grad_out, p.q, p.k, p.v, p.q, lse, p.first_key, p.head_bounds, **p.options,
                **{"grad_k": sums, "grad_v": sums, **wrong},
            )  # fmt: skip
    with pytest.raises(ValueError, match="lse: got"):
        attention_backward(
            p.grad_out, p.q, p.k, p.v, p.q, lse[:, :, :4], p.first_key, p.head_bounds, **p.options,
            grad_k=sums, grad_v=sums,
        )  # fmt: skip


def test_no_queries_give_nothing(dtype: torch.dtype) -> None:
    p = problem(queries=5, dtype=dtype)
    none = p.q[:, :, :0]
    out, lse = attention_forward(none, p.k, p.v, p.first_key[:, :, :0], p.head_bounds, start=2, scaling=1.0)
    assert out.shape == (1, 9, 0, 64)
    assert lse.shape == (1, 9, 0)
