"""Attention sinks: one more logit a head in the softmax, with every backend that runs here."""

from contextlib import suppress

import pytest
import torch
from tests.attention.dense_attention import dense_mask, random_tensors

from longfit.attention.backends import BACKENDS, choose_backend, sinks_grad, tile_backward, tile_forward
from longfit.attention.tile import QueryTile
from longfit.attention.visibility import build_schedule, document_starts
from longfit.errors import BackendError

TOKENS = 37


def dense(q, k, v, sinks, schedule, scaling):
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scaling).masked_fill(~dense_mask(schedule), float("-inf"))
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


def supported(dtype: torch.dtype) -> list[str]:
    q, k, v = random_tensors(6, 2, TOKENS, dtype)[0]
    names = []
    for backend in BACKENDS:
        with suppress(BackendError):
            names.append(choose_backend(q, k, v, name=backend.name).name)
    return names


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"),
    # Sums of 37 terms in another order: a few units of the last place of the dtype; bfloat16 rounds its results.
    [(torch.float64, name, 1e-12) for name in supported(torch.float64)]
    + [(torch.float32, name, 1e-5) for name in supported(torch.float32)]
    + [(torch.bfloat16, name, 3e-2) for name in supported(torch.bfloat16)],
)
def test_forward_and_gradients_equal_the_dense_softmax(dtype, backend: str, tolerance: float, window) -> None:
    (q, k, v), grad = random_tensors(6, 2, TOKENS, dtype)
    q, k, v = (x.detach() for x in (q, k, v))
    sinks = torch.linspace(-2, 3, 6).to(dtype)
    starts = document_starts(2, TOKENS)
    schedule = build_schedule(6, starts, sliding_window=window)
    assert choose_backend(q, k, v, name=backend).name == backend
    leaves = [x.double().requires_grad_() for x in (q, k, v, sinks)]
    expected = dense(*leaves, schedule, 0.3)
    expected.backward(grad.double())
    tile = QueryTile(q, k, v, schedule, 0, 0.3, None, sinks)
    out, lse = tile_forward(tile, backend=backend)
    sums = [torch.zeros(x.shape, dtype=lse.dtype) for x in (k, v)]
    grad_q = tile_backward(tile, grad, out, lse, grad_k=sums[0], grad_v=sums[1], backend=backend)
    found = [out, grad_q, *sums, sinks_grad(grad, out, lse, sinks)]
    for got, wanted in zip(found, [expected.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        assert (got.double() - wanted).norm() <= tolerance * wanted.norm()
