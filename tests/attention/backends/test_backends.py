"""Tile attention against the dense mask: every backend, forward and gradients."""

import warnings

import pytest
import torch
from tests.attention.dense_attention import dense_mask, random_tensors

from longfit.attention import backends
from longfit.attention.backends import BACKENDS, choose_backend, reference, tile_backward, tile_forward
from longfit.attention.tile import QueryTile
from longfit.attention.visibility import build_schedule, document_starts
from longfit.errors import BackendError
from longfit.kernels.dispatch import TABLE, Dispatcher, use_backend
from longfit.numerics import shifted_attention as oracle

HEADS = [(6, 2), (9, 3), (8, 1), (1, 1)]
LENGTHS = [1, 63, 65, 130]
SCHEDULES = {
    "exact": {},
    "shifted": {"group_size": 16},
    "shifted wide": {"group_size": 300},
    "sliding": {"sliding_window": 9},
}
DOCUMENTS = {
    "one": lambda tokens: {},
    "packed": lambda tokens: {"position_ids": torch.stack([torch.arange(tokens) % 37, torch.arange(tokens) % 100])},
    "padded": lambda tokens: {
        "attention_mask": torch.stack(
            [torch.arange(tokens) >= tokens // 3, torch.arange(tokens) < max(1, tokens - tokens // 4)]
        )
    },
}
FLOAT64 = {"rtol": 0.0, "atol": 1e-12}  # sums of a few hundred products of order one: about 1e-14


def by_tiles(qkv, grad_out, schedule, *, tile: int, backend: str | None = None, **settings):
    """out, lse, dq, dk, dv of all tokens; tiles last to first in backward; results poisoned before."""
    q, k, v = (x.detach() for x in qkv)
    tokens = q.shape[2]
    out, grad_q = torch.full_like(grad_out, torch.nan), torch.full_like(q, torch.nan)
    sum_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(q.shape[:3], torch.nan, dtype=sum_dtype)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=sum_dtype) for x in (k, v))
    spans = [(low, min(low + tile, tokens)) for low in range(0, tokens, tile)]
    for low, high in spans:
        here = QueryTile(q[:, :, low:high], k[:, :, :high], v[:, :, :high], schedule, low, **settings)
        out[:, :, low:high], lse[:, :, low:high] = tile_forward(here, backend=backend)
    for low, high in reversed(spans):
        here = QueryTile(q[:, :, low:high], k[:, :, :high], v[:, :, :high], schedule, low, **settings)
        grad_q[:, :, low:high] = tile_backward(
            here,
            grad_out[:, :, low:high],
            out[:, :, low:high],
            lse[:, :, low:high],
            grad_k=grad_k[:, :, :high],
            grad_v=grad_v[:, :, :high],
            backend=backend,
        )
    return out, lse, grad_q, grad_k, grad_v


def dense(qkv, grad_out, schedule, *, scaling: float, softcap: float | None = None):
    out = oracle.dense_attention(*qkv, dense_mask(schedule), scaling=scaling, softcap=softcap)
    return out.detach(), *torch.autograd.grad(out, qkv, grad_out)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("backend", [("aten", None), ("reference", 2.0)])
def test_equals_the_dense_mask(backend, kind: str, heads: int, kv_heads: int, monkeypatch) -> None:
    name, softcap = backend
    # Small blocks, so that a few tokens meet every seam; 48 queries is below a tile and no divisor of anything.
    monkeypatch.setattr(reference, "QUERY_BLOCK", 48)
    monkeypatch.setattr(reference, "SCORE_ELEMENTS", 1)
    for tokens in LENGTHS:
        for documents in DOCUMENTS.values():
            starts = document_starts(2, tokens, **documents(tokens))
            schedule = build_schedule(heads, starts, **SCHEDULES[kind])
            qkv, grad_out = random_tensors(heads, kv_heads, tokens)
            expected, *gradients = dense(qkv, grad_out, schedule, scaling=0.5, softcap=softcap)
            for tile in (tokens, 50) if tokens == LENGTHS[-1] else (tokens,):
                out, _, *ours = by_tiles(qkv, grad_out, schedule, tile=tile, backend=name, scaling=0.5, softcap=softcap)
                torch.testing.assert_close(out, expected, **FLOAT64)
                for got, want in zip(ours, gradients, strict=True):
                    torch.testing.assert_close(got, want, **FLOAT64)


def test_log_sum_exp_is_that_of_the_visible_scores() -> None:
    schedule = build_schedule(6, document_starts(2, 65), group_size=16)
    qkv, grad_out = random_tensors(6, 2, 65)
    scores = qkv[0] @ qkv[1].repeat_interleave(3, 1).mT * 0.5
    expected = scores.masked_fill(~dense_mask(schedule), -torch.inf).logsumexp(-1).detach()
    for backend in ("aten", "reference"):
        lse = by_tiles(qkv, grad_out, schedule, tile=50, backend=backend, scaling=0.5)[1]
        torch.testing.assert_close(lse, expected, **FLOAT64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", [row.name for row in BACKENDS])
def test_low_precision(dtype: torch.dtype, backend: str) -> None:
    """Each backend against float64 of the same rounded inputs, in units of the dtype's rounding error."""
    schedule = build_schedule(9, document_starts(2, 130), group_size=64)
    qkv, grad_out = random_tensors(9, 3, 130, dtype=dtype, dim=64)
    row = next(row for row in BACKENDS if row.name == backend)
    reason = row.why_not(*qkv)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    exact_inputs = [x.detach().double().requires_grad_() for x in qkv]
    expected = dense(exact_inputs, grad_out.double(), schedule, scaling=0.125)
    out, _, *ours = by_tiles(qkv, grad_out, schedule, tile=50, backend=backend, scaling=0.125)
    # Sums run in float32. 16-bit types round the probabilities, ds, the out inside delta and the results, each once: at
    # most 8 roundings of eps / 2 of the largest element. In float32 the rounding of sums counts: a score of size 5 made
    # of 64 products is off by sqrt(64) * 5 half eps, its exponential by as much relatively, and so are the gradients.
    roundings = 8 if dtype.itemsize == 2 else 8 + 8 * 5
    limit = roundings * torch.finfo(dtype).eps / 2
    for got, want in zip((out, *ours), expected, strict=True):
        assert got.isfinite().all()
        assert (got.double() - want).abs().max() <= limit * want.abs().max()


def test_strange_strides_and_gradients() -> None:
    schedule = build_schedule(4, document_starts(2, 65), group_size=16)
    qkv, _ = random_tensors(4, 2, 65)
    qkv = [
        x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in qkv
    ]  # D is not last in memory
    grad_out = torch.ones((), dtype=torch.float64).expand(2, 4, 65, 8)  # what sum() sends back: all strides zero
    expected = dense(qkv, grad_out, schedule, scaling=1.0)
    for backend in ("aten", "reference"):
        q, k, v = (x.detach() for x in qkv)
        sums = [torch.zeros_like(x) for x in (k, v)]
        tile = QueryTile(q, k, v, schedule, 0, 1.0)
        out, lse = tile_forward(tile, backend=backend)
        grad_q = tile_backward(tile, grad_out, out, lse, backend=backend, grad_k=sums[0], grad_v=sums[1])
        for got, want in zip((out, grad_q, *sums), expected, strict=True):
            torch.testing.assert_close(got, want, **FLOAT64)


def test_backward_adds_to_what_is_there_and_backends_share_the_log_sum_exp() -> None:
    schedule = build_schedule(4, document_starts(2, 65))
    qkv, grad_out = random_tensors(4, 2, 65)
    q, k, v = (x.detach() for x in qkv)
    _, _, dk, dv = dense(qkv, grad_out, schedule, scaling=1.0)
    tile = QueryTile(q, k, v, schedule, 0, 1.0)
    out, lse = tile_forward(tile, backend="aten")
    grad_k, grad_v = torch.ones_like(k), torch.ones_like(v)
    tile_backward(tile, grad_out, out, lse, backend="reference", grad_k=grad_k, grad_v=grad_v)
    torch.testing.assert_close(grad_k, dk + 1, **FLOAT64)
    torch.testing.assert_close(grad_v, dv + 1, **FLOAT64)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_nothing_before_a_token_depends_on_it(kind: str, backend: str) -> None:
    tokens = 130
    schedule = build_schedule(6, document_starts(2, tokens), **SCHEDULES[kind])
    (q, k, v), _ = random_tensors(6, 2, tokens)
    q, k, v = q.detach(), k.detach(), v.detach()
    clean, _ = tile_forward(QueryTile(q, k, v, schedule, 0, 1.0), backend=backend)
    for t in (0, 7, 8, 64, 129):
        x, y, z = q.clone(), k.clone(), v.clone()
        x[:, :, t], y[:, :, t], z[:, :, t] = 1e3, 1e3, 1e3
        out, _ = tile_forward(QueryTile(x, y, z, schedule, 0, 1.0), backend=backend)
        assert torch.equal(out[:, :, :t], clean[:, :, :t])
        assert (out[:, :, t] != clean[:, :, t]).all()


def test_the_table_is_the_dispatchers_and_use_backend_forces_it() -> None:
    assert tuple(row.name for row in BACKENDS) == TABLE["attention"]
    (q, k, v), _ = random_tensors(4, 2, 8)
    for name in ("aten", "reference"):
        with use_backend(name):
            assert choose_backend(q, k, v).name == name
    with (
        use_backend("aten", op="attention"),
        pytest.raises(BackendError, match="attention with the backend 'aten', which is forced: it has no soft cap"),
    ):
        choose_backend(q, k, v, softcap=3.0)


def test_a_call_that_only_the_reference_takes_is_warned_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Dispatcher()
    monkeypatch.setattr(backends, "dispatcher", lambda: fresh)
    (q, k, v), _ = random_tensors(4, 2, 8)
    with pytest.warns(
        RuntimeWarning, match="attention runs in longfit's slow reference; .*not aten: it has no soft cap"
    ):
        choose_backend(q, k, v, softcap=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_backend(q, k, v, softcap=3.0)


def test_choosing_a_backend() -> None:
    (q, k, v), _ = random_tensors(4, 2, 8)
    assert choose_backend(q, k, v, softcap=3.0).name == "reference"
    assert BACKENDS[-1].why_not(q, k, v, softcap=3.0) is None
    assert choose_backend(q, k, v, name="reference").name == "reference"
    with pytest.raises(BackendError, match="'aten': it has no soft cap"):
        choose_backend(q, k, v, softcap=3.0, name="aten")
    with pytest.raises(BackendError, match="'aten': values of 4 dimensions"):
        choose_backend(q, k, v[..., :4], name="aten")
    with pytest.raises(BackendError, match=r"unknown; allowed are .*reference"):
        choose_backend(q, k, v, name="flash9")
    with pytest.raises(BackendError, match="no soft cap"):
        tile_forward(QueryTile(q, k, v, build_schedule(4, document_starts(2, 8)), 0, 1.0, 1.0), backend="aten")


def test_gradient_sums_must_be_wide() -> None:
    (q, k, v), grad_out = random_tensors(4, 2, 8, dtype=torch.bfloat16)
    schedule = build_schedule(4, document_starts(2, 8))
    tile = QueryTile(q, k, v, schedule, 0, 1.0)
    out, lse = tile_forward(tile)
    with pytest.raises(ValueError, match="float32"):
        tile_backward(tile, grad_out, out, lse, grad_k=torch.zeros_like(k), grad_v=torch.zeros_like(v))
