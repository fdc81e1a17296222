"""Perplexity against a plain loop over full logits, for both conventions, and what makes two numbers incomparable."""

import math

import pytest
import torch
from tests.tiny_models import VOCABULARY, tiny_model

from longfit.attention.hf_attention import attention_key
from longfit.engine.working_memory import SMALLEST_TILE
from longfit.errors import ConfigError, DataError
from longfit.evaluation.perplexity import perplexity

# float64 throughout; transformers' eager attention takes its softmax in float32, hence its key is not used here
EXACT = {"rel": 1e-10}


def text(tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (tokens,))


@torch.no_grad()
def plain_losses(model, ids: torch.Tensor) -> torch.Tensor:
    """Loss of every token but the first, from full logits."""
    logits = model.eval()(input_ids=ids[None], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 caps its logits and ties its head
def test_document_convention_is_the_strided_loop(family: str) -> None:
    model = tiny_model(family, attn_implementation=attention_key())
    documents = [text(50), text(1), text(20), text(33)]
    result = perplexity(model, documents, window=20, stride=8, bucket_tokens=6)
    totals: dict[int, list[float]] = {}
    for ids in documents:
        scored = 0
        for start in range(0, len(ids), 8):
            window = ids[start : start + 20]
            losses = plain_losses(model, window) if len(window) > 1 else torch.zeros(0)
            for position, loss in enumerate(losses.tolist(), start=1):
                if start + position >= scored:
                    totals.setdefault(position // 6, []).append(loss)
            scored = start + len(window)
            if scored == len(ids):
                break
    everything = [loss for losses in totals.values() for loss in losses]
    assert result.num_tokens == len(everything) == 49 + 0 + 19 + 32  # each token once, but the first of a document
    assert (result.num_documents, result.unread_tokens) == (3, 1)
    assert result.nll == pytest.approx(sum(everything) / len(everything), **EXACT)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert [bucket.start for bucket in result.by_position] == [0, 6, 12, 18]
    assert result.by_position[-1].stop == 20
    for bucket in result.by_position:
        expected = totals[bucket.start // 6]
        assert bucket.num_tokens == len(expected)
        assert bucket.nll == pytest.approx(sum(expected) / len(expected), **EXACT)
        assert bucket.perplexity == pytest.approx(math.exp(bucket.nll))


def test_without_overlap_the_first_token_of_a_window_is_not_scored() -> None:
    model = tiny_model("llama", attn_implementation=attention_key())
    ids = text(41)
    result = perplexity(model, ids, window=20, stride=20)
    expected = torch.cat([plain_losses(model, ids[:20]), plain_losses(model, ids[20:40])])
    assert (result.num_tokens, result.num_windows) == (38, 2)  # the 41st stands alone
    assert result.nll == pytest.approx(expected.mean().item(), **EXACT)


def test_longlora_convention_is_the_mean_over_whole_windows() -> None:
    model = tiny_model("qwen2", attn_implementation=attention_key())
    ids, short = text(45), text(19)
    result = perplexity(model, [ids, short], window=20, stride=7, convention="longlora")
    windows = [plain_losses(model, ids[start : start + 20]).mean() for start in (0, 7, 14, 21)]
    assert (result.num_windows, result.num_tokens) == (4, 4 * 19)
    assert (result.num_documents, result.unread_tokens) == (1, 4 + 19)
    assert result.by_window == pytest.approx([window.item() for window in windows], **EXACT)
    assert result.nll == pytest.approx(torch.stack(windows).mean().item(), **EXACT)
    assert result.convention == "longlora"
    other = perplexity(model, [ids, short], window=20, stride=7)
    assert abs(other.nll - result.nll) > 1e-3  # the conventions are different measures


def test_windows_are_read_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers never see a whole window, and nothing of the model's own checkpointing or attention is lost."""
    monkeypatch.setattr("longfit.engine.working_memory.LARGEST_TILE", SMALLEST_TILE)
    model, seen = tiny_model("llama", attn_implementation="sdpa"), []
    model.gradient_checkpointing_enable()
    doors = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    model.model.layers[1].mlp.register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[1]))
    ids = text(600)
    result = perplexity(model, ids, window=600, stride=600)
    assert max(seen) == SMALLEST_TILE < 600
    assert result.nll == pytest.approx(plain_losses(model, ids).mean().item(), rel=1e-6)  # sdpa's softmax is float32
    assert model.config._attn_implementation == "sdpa"
    assert doors == [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    assert model.is_gradient_checkpointing


def test_evaluates_exactly_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama", attn_implementation=attention_key("shifted", 4)).train()
    model.model.layers[1].eval()
    exact = tiny_model("llama", attn_implementation=attention_key())
    ids, calls = text(60), []
    shifted_result = perplexity(model, ids, window=30, stride=30, on_progress=lambda *call: calls.append(call))
    assert shifted_result == perplexity(exact, ids, window=30, stride=30)
    assert calls == [(1, 2), (2, 2)]
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.layers[1].training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"convention": "yarn"}, ConfigError, "allowed are document, longlora"),
        ({"window": 1}, ConfigError, "at least 2 tokens"),
        ({"stride": 0}, ConfigError, "from 1 to the window"),
        ({"stride": 11}, ConfigError, "from 1 to the window, 10"),
        ({"bucket_tokens": 0}, ConfigError, "at least 1"),
        ({"token_ids": torch.tensor([5])}, DataError, "nothing to score"),
        ({"token_ids": []}, DataError, "nothing to score"),
        ({"token_ids": torch.arange(9), "convention": "longlora"}, DataError, "at least 10 are needed"),
        ({"token_ids": torch.arange(12)[None]}, DataError, "one dimension per document"),
        ({"token_ids": torch.tensor([1, VOCABULARY])}, DataError, "the model knows 0 to 96"),
        ({"token_ids": torch.tensor([1, -100])}, DataError, "run from -100"),
    ],
)
def test_errors(settings, error, message: str) -> None:
    model = tiny_model("llama", attn_implementation=attention_key())
    arguments = {"token_ids": torch.arange(12), "window": 10, "stride": 5, **settings}
    with pytest.raises(error, match=message):
        perplexity(model, arguments.pop("token_ids"), **arguments)
    assert model.training
