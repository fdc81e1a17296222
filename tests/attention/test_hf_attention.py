"""The attention registered with transformers, inside unpatched models, against the dense mask."""

from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tests.attention.dense_attention import dense_mask, random_tensors
from tests.tiny_models import FAMILIES, SLIDING_WINDOW, VOCABULARY, tiny_model
from transformers import AttentionInterface, AttentionMaskInterface

from longfit.attention import hf_attention
from longfit.attention.hf_attention import attend, attention_key
from longfit.attention.visibility import build_schedule, document_starts
from longfit.errors import ContextError, DataError, ModelError
from longfit.numerics import shifted_attention as oracle


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
    AttentionMaskInterface.register(key, hf_attention.visible_keys)
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
        def attend(self, query, key, value, spec):
            seen.update(vars(spec))
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


def test_dropout_is_trained_with_zero_and_said() -> None:
    (q, k, v), _ = random_tensors(4, 2, 8)
    module = SimpleNamespace(training=True, is_causal=True)
    expected, _ = attend(module, q, k, v, None)
    with pytest.warns(UserWarning, match="attention dropout 0.1 of SimpleNamespace is trained with 0"):
        found, _ = attend(module, q, k, v, None, dropout=0.1)
    assert torch.equal(found, expected)


def test_shifting_with_a_cache_is_refused() -> None:
    (q, k, v), _ = random_tensors(4, 2, 8)
    with pytest.raises(ModelError, match=r"model.eval\(\) before generating"):
        attend(SimpleNamespace(training=True), q[:, :, :1], k, v, None, group_size=4)
