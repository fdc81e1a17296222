"""Tile attention against the dense mask, every backend, forward and gradients; and inside unpatched models."""

from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tests.tiny_models import FAMILIES, SLIDING_WINDOW, VOCABULARY, tiny_model
from transformers import AttentionInterface, AttentionMaskInterface

from longfit.engine import attention as attention_module
from longfit.engine import attention_aten, attention_reference
from longfit.engine.attention import attend, attention_key
from longfit.engine.schedule import build_schedule, document_starts
from longfit.engine.tile_attention import BACKENDS, choose_backend, tile_backward, tile_forward
from longfit.errors import BackendError, ContextError, DataError, ModelError
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


def dense_mask(schedule) -> torch.Tensor:
    keys = torch.arange(schedule.num_tokens)
    heads = torch.tensor(schedule.head_bounds).diff()
    first = schedule.first_key.transpose(0, 1).repeat_interleave(heads, dim=1)[..., None]  # [B, H, T, 1]
    return (keys >= first) & (keys <= keys[:, None])


def random_tensors(heads: int, kv_heads: int, tokens: int, dtype=torch.float64, dim: int = 8):
    """q, k, v, grad_out as layers make them: views of [B, T, heads, D] memory."""
    made = [torch.randn(2, tokens, h, dim).to(dtype).transpose(1, 2) for h in (heads, kv_heads, kv_heads, heads)]
    return [x.requires_grad_() for x in made[:3]], made[3]


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
        out[:, :, low:high], lse[:, :, low:high] = tile_forward(
            q[:, :, low:high], k[:, :, :high], v[:, :, :high], schedule, start=low, backend=backend, **settings
        )
    for low, high in reversed(spans):
        grad_q[:, :, low:high] = tile_backward(
            grad_out[:, :, low:high],
            q[:, :, low:high],
            k[:, :, :high],
            v[:, :, :high],
            out[:, :, low:high],
            lse[:, :, low:high],
            schedule,
            start=low,
            backend=backend,
            grad_k=grad_k[:, :, :high],
            grad_v=grad_v[:, :, :high],
            **settings,
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
    monkeypatch.setattr(attention_reference, "QUERY_BLOCK", 48)
    monkeypatch.setattr(attention_reference, "SCORE_ELEMENTS", 1)
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
    reason = row.supports(*qkv, softcap=None)
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
        out, lse = tile_forward(q, k, v, schedule, start=0, scaling=1.0, backend=backend)
        grad_q = tile_backward(
            grad_out, q, k, v, out, lse, schedule, start=0, scaling=1.0, backend=backend, grad_k=sums[0], grad_v=sums[1]
        )
        for got, want in zip((out, grad_q, *sums), expected, strict=True):
            torch.testing.assert_close(got, want, **FLOAT64)


def test_backward_adds_to_what_is_there_and_backends_share_the_log_sum_exp() -> None:
    schedule = build_schedule(4, document_starts(2, 65))
    qkv, grad_out = random_tensors(4, 2, 65)
    q, k, v = (x.detach() for x in qkv)
    _, _, dk, dv = dense(qkv, grad_out, schedule, scaling=1.0)
    out, lse = tile_forward(q, k, v, schedule, start=0, scaling=1.0, backend="aten")
    grad_k, grad_v = torch.ones_like(k), torch.ones_like(v)
    tile_backward(
        grad_out, q, k, v, out, lse, schedule, start=0, scaling=1.0, backend="reference", grad_k=grad_k, grad_v=grad_v
    )
    torch.testing.assert_close(grad_k, dk + 1, **FLOAT64)
    torch.testing.assert_close(grad_v, dv + 1, **FLOAT64)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_nothing_before_a_token_depends_on_it(kind: str, backend: str) -> None:
    tokens = 130
    schedule = build_schedule(6, document_starts(2, tokens), **SCHEDULES[kind])
    (q, k, v), _ = random_tensors(6, 2, tokens)
    q, k, v = q.detach(), k.detach(), v.detach()
    clean, _ = tile_forward(q, k, v, schedule, start=0, scaling=1.0, backend=backend)
    for t in (0, 7, 8, 64, 129):
        x, y, z = q.clone(), k.clone(), v.clone()
        x[:, :, t], y[:, :, t], z[:, :, t] = 1e3, 1e3, 1e3
        out, _ = tile_forward(x, y, z, schedule, start=0, scaling=1.0, backend=backend)
        assert torch.equal(out[:, :, :t], clean[:, :, :t])
        assert (out[:, :, t] != clean[:, :, t]).all()


def test_pieces_cover_every_query_once_and_stay_small() -> None:
    for settings in SCHEDULES.values():
        for tokens, start in ((130, 0), (700, 33), (1, 5)):
            schedule = build_schedule(4, document_starts(1, start + tokens), **settings)
            for first_key in schedule.tile(start, tokens)[:, 0]:
                pieces = list(attention_aten.pieces(first_key, start))
                assert [pieces[0].low, *(piece.high for piece in pieces)][-1] == start + tokens
                assert all(a.high == b.low for a, b in pairwise(pieces))
                for piece in pieces:
                    masked = [part for part in piece.parts if part.visible == "mask"]
                    assert not masked or piece.high - piece.low <= attention_aten.MASK_BLOCK


def test_choosing_a_backend() -> None:
    (q, k, v), _ = random_tensors(4, 2, 8)
    assert choose_backend(q, k, v, softcap=3.0).name == "reference"
    assert BACKENDS[-1].supports(q, k, v, softcap=3.0) is None
    assert choose_backend(q, k, v, name="reference").name == "reference"
    with pytest.raises(BackendError, match="'aten': it has no soft cap"):
        choose_backend(q, k, v, softcap=3.0, name="aten")
    with pytest.raises(BackendError, match="'aten': values of 4 dimensions"):
        choose_backend(q, k, v[..., :4], name="aten")
    with pytest.raises(BackendError, match=r"unknown; allowed are .*reference"):
        choose_backend(q, k, v, name="flash9")
    with pytest.raises(BackendError, match="no soft cap"):
        tile_forward(
            q, k, v, build_schedule(4, document_starts(2, 8)), start=0, scaling=1.0, softcap=1.0, backend="aten"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, s: (q[:, :3], k, v, s, 0), "multiple of key/value heads"),
        (lambda q, k, v, s: (q, k[:, :, :4], v[:, :, :4], s, 0), "cover the last query"),
        (lambda q, k, v, s: (q, k, v, s, 1), "cover the last query"),
        (lambda q, k, v, s: (q, k.float(), v, s, 0), "one dtype"),
        (lambda q, k, v, s: (q[0], k, v, s, 0), r"must be \[B, H, t, D\]"),
        (lambda q, k, v, s: (q[:1], k[:1], v[:1], s, 0), "schedule of 2 rows"),
        (lambda q, k, v, s: (q[:, :2], k, v, s, 0), "4 heads does not fit"),
    ],
)
def test_shapes_that_do_not_fit(change, message: str) -> None:
    (q, k, v), _ = random_tensors(4, 2, 8)
    q, k, v, schedule, start = change(q, k, v, build_schedule(4, document_starts(2, 8)))
    with pytest.raises(ValueError, match=message):
        tile_forward(q, k, v, schedule, start=start, scaling=1.0)


def test_gradient_sums_must_be_wide() -> None:
    (q, k, v), grad_out = random_tensors(4, 2, 8, dtype=torch.bfloat16)
    schedule = build_schedule(4, document_starts(2, 8))
    out, lse = tile_forward(q, k, v, schedule, start=0, scaling=1.0)
    with pytest.raises(ValueError, match="float32"):
        tile_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            schedule,
            start=0,
            scaling=1.0,
            grad_k=torch.zeros_like(k),
            grad_v=torch.zeros_like(v),
        )


# ---- inside transformers ---------------------------------------------------------------------------------------------


def dense_in_transformers(module, query, key, value, attention_mask, *, group_size=None, scaling=None, **kwargs):
    """The oracle as an attention of transformers: float64 throughout, unlike its eager attention."""
    starts = document_starts(
        query.shape[0], query.shape[2], position_ids=kwargs["position_ids"], attention_mask=attention_mask
    )
    schedule = build_schedule(
        query.shape[1],
        starts,
        group_size=group_size if module.training else None,
        sliding_window=kwargs.get("sliding_window"),
    )
    out = oracle.dense_attention(
        query, key, value, dense_mask(schedule), scaling=scaling, softcap=kwargs.get("softcap")
    )
    return out.transpose(1, 2).contiguous(), None


@cache
def oracle_key(group_size: int | None) -> str:
    key = f"oracle-{group_size}"
    AttentionInterface.register(
        key, lambda *args, **kwargs: dense_in_transformers(*args, group_size=group_size, **kwargs)
    )
    AttentionMaskInterface.register(key, attention_module.padding_mask)
    return key


def inputs(tokens: int) -> dict[str, dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCABULARY, (2, tokens))
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0, : tokens // 5], mask[1, tokens - tokens // 6 :] = 0, 0
    packed = torch.stack([torch.arange(tokens) % 30, torch.arange(tokens) % 41])
    return {
        "plain": {"input_ids": ids},
        "padded": {"input_ids": ids, "attention_mask": mask},
        "packed": {"input_ids": ids, "position_ids": packed},
    }


def run(model, batch, *, train: bool = True):
    """Logits of the real tokens, and the gradients of a random functional of them."""
    model.train(train)
    logits = model(**batch, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    logits, weights = logits[real], weights[real]
    names, parameters = zip(*model.named_parameters(), strict=True)
    return logits.detach(), dict(zip(names, torch.autograd.grad((logits * weights).sum(), parameters), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 1)])
def test_models_equal_the_oracle_in_float64(family: str, heads: int, kv_heads: int) -> None:
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads}
    for group_size in (None, 12):
        key = attention_key() if group_size is None else attention_key("shifted", group_size)
        ours = tiny_model(family, attn_implementation=key, **sizes)
        theirs = tiny_model(family, attn_implementation=oracle_key(group_size), **sizes)
        for batch in inputs(65).values():
            logits, gradients = run(ours, batch)
            expected, expected_gradients = run(theirs, batch)
            torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
            for name, want in expected_gradients.items():
                error = (gradients[name] - want).norm() / want.norm().clamp_min(1e-30)
                assert error < 1e-10, (name, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_equal_eager_and_shift_only_while_training(family: str) -> None:
    # float32 on both sides, additions in another order: tens of roundings (6e-8) of logits near 1
    limit = {"rtol": 0.0, "atol": 1e-5}
    eager = tiny_model(family, dtype=torch.float32)
    exact = tiny_model(family, dtype=torch.float32, attn_implementation=attention_key())
    shifted = tiny_model(family, dtype=torch.float32, attn_implementation=attention_key("shifted", 12))
    for batch in inputs(65).values():
        expected, expected_gradients = run(eager, batch)
        logits, gradients = run(exact, batch)
        torch.testing.assert_close(logits, expected, **limit)
        for name, want in expected_gradients.items():
            assert (gradients[name] - want).norm() <= 1e-4 * want.norm()
        torch.testing.assert_close(run(shifted, batch, train=False)[0], expected, **limit)
        assert (run(shifted, batch)[0] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_generation_with_a_cache_equals_eager(family: str, cache_implementation: str | None) -> None:
    eager = tiny_model(family, dtype=torch.float32).eval()
    ours = tiny_model(family, dtype=torch.float32, attn_implementation=attention_key("shifted", 12)).eval()
    prompt = {name: value[:, :20] for name, value in inputs(65)["padded"].items()}
    prompt["attention_mask"][:] = 1
    prompt["attention_mask"][0, :7] = 0  # generation pads to the left
    settings = {"max_new_tokens": 2 * SLIDING_WINDOW, "min_new_tokens": 2 * SLIDING_WINDOW, "do_sample": False}
    results = [
        model.generate(
            **prompt,
            **settings,
            cache_implementation=cache_implementation,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for model in (eager, ours)
    ]
    assert torch.equal(results[0].sequences, results[1].sequences)
    for expected, logits in zip(results[0].logits, results[1].logits, strict=True):
        torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-5)  # float32, as above


def test_no_logit_depends_on_a_later_token() -> None:
    model = tiny_model("llama", attn_implementation=attention_key("shifted", 12), num_heads=9, num_kv_heads=3)
    ids = torch.randint(3, VOCABULARY, (1, 75))
    clean = model(input_ids=ids, use_cache=False).logits
    for t in (1, 6, 12, 40, 74):
        changed = ids.clone()
        changed[0, t] = 3 + (ids[0, t] - 2) % (VOCABULARY - 3)
        logits = model(input_ids=changed, use_cache=False).logits
        assert torch.equal(logits[:, :t], clean[:, :t])
        assert not torch.equal(logits[:, t], clean[:, t])


def test_flattened_documents_equal_separate_ones() -> None:
    model = tiny_model("qwen3", attn_implementation=attention_key("shifted", 12))
    ids = torch.randint(3, VOCABULARY, (1, 60))
    bounds = [0, 25, 26, 60]
    positions = torch.cat([torch.arange(high - low) for low, high in pairwise(bounds)])[None]
    apart = torch.cat([model(input_ids=ids[:, a:b], use_cache=False).logits for a, b in pairwise(bounds)], 1)
    cumulated = torch.tensor(bounds, dtype=torch.int32)
    together = model(
        input_ids=ids,
        position_ids=positions,
        cu_seq_lens_q=cumulated,
        cu_seq_lens_k=cumulated,
        max_length_q=34,
        max_length_k=34,
        use_cache=False,
    ).logits
    torch.testing.assert_close(together, apart, rtol=0.0, atol=1e-10)


def test_bfloat16_is_no_worse_than_transformers() -> None:
    """Errors against float64 of the same bfloat16 weights, our attention beside transformers' own."""
    batch = inputs(130)["plain"]
    reference = tiny_model("llama", num_heads=9, num_kv_heads=3, attn_implementation=oracle_key(None))
    reference.load_state_dict(tiny_model("llama", num_heads=9, num_kv_heads=3, dtype=torch.bfloat16).state_dict())
    expected = run(reference, batch)[0]
    errors = {}
    for key in ("sdpa", attention_key()):
        model = tiny_model("llama", num_heads=9, num_kv_heads=3, dtype=torch.bfloat16, attn_implementation=key)
        errors[key] = (run(model, batch)[0].double() - expected).norm()
    # Both are one sample of the same rounding noise over 130 * 97 logits: their norms agree to a few per cent.
    assert errors["longfit-exact"] <= 1.25 * errors["sdpa"]


def test_autocast_runs_in_its_dtype() -> None:
    model = tiny_model("llama", dtype=torch.float32, attn_implementation=attention_key())
    ids = torch.randint(3, VOCABULARY, (1, 40))
    expected = model(input_ids=ids, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    # two layers of bfloat16 matmuls on logits near 1: tens of roundings of 2 ** -9
    torch.testing.assert_close(logits.float(), expected, rtol=0.0, atol=30 * 2**-9)
    logits.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_keys() -> None:
    assert attention_key() == attention_key("exact") == "longfit-exact"
    assert attention_key("shifted", 64) == attention_key("shifted", 64) == "longfit-shifted-64"
    for arguments, message in (
        (("exact", 64), "no groups"),
        (("shifted",), "needs an even number"),
        (("shifted", 63), "try group_size 64"),
        (("flash",), "allowed are 'exact' and 'shifted'"),
    ):
        with pytest.raises(ContextError, match=message):
            attention_key(*arguments)


def test_the_sweep_is_handed_everything() -> None:
    seen = {}

    class Tile:
        def attend(self, query, key, value, **settings):
            seen.update(settings)
            return query.transpose(1, 2)

    (q, k, v), _ = random_tensors(4, 2, 8)
    module = torch.nn.Module().train()
    positions, mask = torch.arange(8)[None], torch.ones(2, 8, dtype=torch.bool)
    out, weights = attend(
        module, q, k, v, mask, group_size=6, position_ids=positions, softcap=2.0, sliding_window=5, sweep=Tile()
    )
    assert out is not None
    assert weights is None
    assert torch.equal(out, q.transpose(1, 2))
    assert (seen["group_size"], seen["sliding_window"], seen["softcap"]) == (6, 5, 2.0)
    assert seen["scaling"] == 8**-0.5
    assert seen["position_ids"] is positions
    assert seen["attention_mask"] is mask
    assert seen["cu_seqlens"] is None
    attend(module.eval(), q, k, v, mask, group_size=6, sweep=Tile())
    assert seen["group_size"] is None


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dropout": 0.1}, ModelError, "attention_dropout=0.0"),
        ({"s_aux": torch.zeros(4)}, ModelError, "attention sinks"),
        ({"output_attentions": True}, ModelError, "never exist"),
        ({"is_causal": False}, ModelError, "both directions"),
        ({"attention_mask": torch.ones(2, 1, 8, 8)}, ModelError, r"allowed is \[batch, keys\]"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1]] * 2)}, DataError, "padding between"),
    ],
)
def test_what_it_does_not_do_is_refused(settings, error, message: str) -> None:
    (q, k, v), _ = random_tensors(4, 2, 8)
    module = SimpleNamespace(training=True, is_causal=True)
    with pytest.raises(error, match=message):
        attend(module, q, k, v, settings.pop("attention_mask", None), **settings)


def test_shifting_with_a_cache_is_refused() -> None:
    (q, k, v), _ = random_tensors(4, 2, 8)
    with pytest.raises(ModelError, match=r"model.eval\(\) before generating"):
        attend(SimpleNamespace(training=True), q[:, :, :1], k, v, None, group_size=4)
