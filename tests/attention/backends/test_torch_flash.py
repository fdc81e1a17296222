"""The CUDA attention backends: what they ask of torch's kernels, and what they make of the answers.

Without a card ``flash_ops.py`` stands in for the kernels, behind the schemas of the true operators. Where a card is,
the same schedules run through the kernels themselves.
"""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.attention.flash_ops import StandIns
from torch import Tensor

from longfit.attention import backends
from longfit.attention import varlen as sequences
from longfit.attention.backends import reference, torch_efficient, torch_flash
from longfit.attention.tile import QueryTile
from longfit.attention.visibility import Schedule, build_schedule, document_starts

HEADS = [(9, 3), (1, 1)]
TOKENS = 90
SCHEDULES = {
    "exact": {},
    "shifted": {"group_size": 16},
    "sliding": {"sliding_window": 9},
}
DOCUMENTS = {
    "one": lambda tokens: {},
    "packed": lambda tokens: {"position_ids": torch.stack([torch.arange(tokens) % 37, torch.arange(tokens) % 100])},
    "padded": lambda tokens: {"attention_mask": torch.stack([torch.arange(tokens) >= 40, torch.arange(tokens) < 79])},
}
BACKENDS = {"flash": torch_flash, "efficient": torch_efficient}


@pytest.fixture(params=BACKENDS)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A backend with blocks so small that a few tokens meet every seam."""
    module = BACKENDS[request.param]
    monkeypatch.setattr(module, "KEY_BLOCK", 24)
    return module


def by_tiles(module: ModuleType, tensors: list[Tensor], schedule: Schedule, *, tile: int) -> list[Tensor]:
    """out, lse, dq, dk, dv; keys and values lie heads-major and longer than needed, as the sweep stores them."""
    q, k, v, grad_out = tensors
    tokens, device = q.shape[2], q.device
    wide = torch.promote_types(q.dtype, torch.float32)
    out, grad_q = torch.full_like(grad_out, torch.nan), torch.full_like(q, torch.nan)
    lse = torch.full(q.shape[:3], torch.nan, dtype=wide, device=device)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=device) for x in (k, v))
    spans = [(low, min(low + tile, tokens)) for low in range(0, tokens, tile)]
    for low, high in spans:
        here = (slice(None), slice(None), slice(low, high))
        out[here], lse[here] = module.forward(QueryTile(q[here], k[:, :, :high], v[:, :, :high], schedule, low, 0.5))
    for low, high in reversed(spans):
        here = (slice(None), slice(None), slice(low, high))
        grad_q[here] = module.backward(
            QueryTile(q[here], k[:, :, :high], v[:, :, :high], schedule, low, 0.5), grad_out[here], out[here],
            lse[here], grad_k=grad_k[:, :, :high], grad_v=grad_v[:, :, :high],
        )  # fmt: skip
    return [out, lse, grad_q, grad_k, grad_v]


def random_tensors(heads: int, kv_heads: int, tokens: int, dtype: torch.dtype, dim: int = 8) -> list[Tensor]:
    q, grad_out = (torch.randn(2, tokens, heads, dim).to(dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(2, kv_heads, tokens + 5, dim).to(dtype)[:, :, :tokens] for _ in range(2))
    return [q, k, v, grad_out]


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_calls_add_up_to_the_reference(small_blocks: ModuleType, kind: str, heads: int, kv_heads: int) -> None:
    for documents in DOCUMENTS.values():
        schedule = build_schedule(heads, document_starts(2, TOKENS, **documents(TOKENS)), **SCHEDULES[kind])
        tensors = random_tensors(heads, kv_heads, TOKENS, torch.float32)
        expected = by_tiles(reference, [x.double() for x in tensors], schedule, tile=TOKENS)
        for tile in (TOKENS, 40):
            with StandIns():
                results = by_tiles(small_blocks, tensors, schedule, tile=tile)
            for got, want in zip(results, expected, strict=True):
                # Parts are computed in float64 and rounded to float32 (eps 1.2e-7), log-sum-exps of size 5 too; at most
                # ten parts of elements below 100 are added: 10 * 100 * eps.
                torch.testing.assert_close(got.double(), want, rtol=0, atol=1.2e-4)


def test_ranges_that_stand_still_after_sliding(small_blocks: ModuleType) -> None:
    """Or jump: sequences then share keys, and cannot lie end to end in one call; no schedule of ours does that."""
    token = torch.arange(TOKENS)
    sliding = torch.minimum(torch.randint(0, 2, (2, TOKENS)).cumsum(-1), token)  # [B, T]
    jumping = torch.where(token < 50, 0, 20).expand(2, -1)
    first_key = torch.stack([sliding, jumping]).int()
    schedule = Schedule(first_key, (0, 4, 9))
    tensors = random_tensors(9, 3, TOKENS, torch.float32)
    expected = by_tiles(reference, [x.double() for x in tensors], schedule, tile=TOKENS)
    with StandIns():
        results = by_tiles(small_blocks, tensors, schedule, tile=40)
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1.2e-4)  # as above


def heads_of_calls(kind: str, tensors: list[Tensor], **documents: Tensor) -> list[int]:
    q, k, v, _ = tensors
    starts = document_starts(q.shape[0], q.shape[2], **documents)
    schedule = build_schedule(q.shape[1], starts, **SCHEDULES[kind])
    with StandIns() as kernels:
        torch_flash.forward(QueryTile(q, k, v, schedule, 0, 1.0))
    return kernels.num_heads


def test_heads_are_split_where_a_tensor_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "MAX_ELEMENTS", 2 * 64 * 8)
    assert heads_of_calls("exact", random_tensors(12, 6, 64, torch.float32)) == [4, 4, 4] * 2


@pytest.mark.parametrize(("kind", "calls"), [("exact", [8]), ("shifted", [4, 4]), ("sliding", [8])])
def test_one_call_for_each_class_of_heads_however_many_documents(kind: str, calls: list[int]) -> None:
    tensors = [x[:1] for x in random_tensors(8, 2, 130, torch.float32)]
    assert heads_of_calls(kind, tensors, position_ids=(torch.arange(130) % 37)[None]) == calls


def a_tensor(dim: int, dtype: torch.dtype = torch.float16, device: str = "cuda") -> Any:
    """What a backend looks at."""
    return SimpleNamespace(
        shape=torch.Size([1, 2, 3, dim]), dtype=dtype, device=torch.device(device), element_size=lambda: dtype.itemsize
    )


@pytest.mark.parametrize(
    ("name", "q", "v", "softcap", "reason"),
    [
        ("flash", a_tensor(64, device="cpu"), None, None, "runs on CUDA, the tensors are on cpu"),
        ("flash", a_tensor(64, torch.float32), None, None, "in torch.float32"),
        ("flash", a_tensor(64), None, 30.0, "no soft cap"),
        ("flash", a_tensor(64), a_tensor(128), None, "values of 128 dimensions"),
        ("flash", a_tensor(208), None, None, "these have 208"),
        ("flash", a_tensor(20), None, None, "these have 20"),
        ("flash", a_tensor(64), None, None, "compute capability 8.0, the card has 7.5"),
        ("efficient", a_tensor(64, device="cpu"), None, None, "runs on CUDA, the tensors are on cpu"),
        ("efficient", a_tensor(64, torch.float64), None, None, "in torch.float64"),
        ("efficient", a_tensor(64, torch.bfloat16), None, None, "no bfloat16"),
        ("efficient", a_tensor(64), None, 30.0, "no soft cap"),
        ("efficient", a_tensor(20), None, None, "these have 20 and 20"),
        ("efficient", a_tensor(20, torch.float32), None, None, None),
        ("efficient", a_tensor(64), a_tensor(128), None, None),
    ],
)
def test_what_is_refused_on_a_turing_card(
    monkeypatch: pytest.MonkeyPatch, name: str, q: Any, v: Any, softcap: float | None, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    row = next(row for row in backends.BACKENDS if row.name == name)
    answer = row.why_not(q, q, v or q, softcap=softcap)
    assert answer is None if reason is None else reason in (answer or "")


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("dim", [64, 128])
def test_on_a_card_equal_to_the_reference(name: str, dtype: torch.dtype, kind: str, dim: int) -> None:
    module = BACKENDS[name]
    for heads, kv_heads in HEADS:
        for documents in DOCUMENTS.values():
            schedule = build_schedule(heads, document_starts(2, 130, **documents(130)), **SCHEDULES[kind])
            tensors = [x.cuda() for x in random_tensors(heads, kv_heads, 130, dtype, dim)]
            reason = module.supports(*tensors[:3])
            if reason is not None:
                pytest.skip(reason)
            on_card = Schedule(schedule.first_key.cuda(), schedule.head_bounds, schedule.host)
            expected = by_tiles(reference, [x.double() for x in tensors], on_card, tile=130)
            # As in test_backends.py: at most 8 roundings of eps / 2 of the largest element in 16 bits; in float32
            # the rounding of sums, of scores of size sqrt(dim) / 2 * 5 made of dim products.
            roundings = 8 if dtype.itemsize == 2 else 8 + 8 * 5 * (dim / 64) ** 0.5
            limit = roundings * torch.finfo(dtype).eps / 2
            for got, want in zip(by_tiles(module, tensors, on_card, tile=50), expected, strict=True):
                assert got.isfinite().all()
                assert (got.double() - want).abs().max() <= limit * want.abs().max()
