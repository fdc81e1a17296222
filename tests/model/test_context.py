"""Extending a model: what changes, that it reloads as it is, that it composes, and that nothing changes on an error."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model
from transformers import AutoModelForCausalLM

from longfit.errors import ContextError, ModelError
from longfit.model.context import extend_context
from longfit.numerics import rope as formulas

# transformers computes rotary tables in float32: each power carries a few ulp (6e-8 each).
FLOAT32_POW = {"rtol": 1e-6, "atol": 0.0}


def logits(model, tokens: int = 150) -> torch.Tensor:
    ids = torch.arange(tokens)[None] % VOCABULARY
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def table(model) -> torch.Tensor:
    rotary = model.model.rotary_emb
    return dict(rotary.named_buffers()).get("full_attention_inv_freq", dict(rotary.named_buffers()).get("inv_freq"))


@pytest.mark.parametrize("rope", ["yarn", "linear", "ntk", "theta", "none"])
def test_tables_are_those_of_numerics_and_the_rest_follows(rope: str) -> None:
    model, tokenizer = tiny_model("llama", dtype=torch.float32), SimpleNamespace(model_max_length=128)
    model.generation_config.max_length = 128
    report = extend_context(model, tokenizer, context=320, rope=rope)
    theta, rotary = 10_000.0, model.model.rotary_emb
    expected = {
        "yarn": formulas.yarn(8, theta, factor=2.5, native_context=128),
        "linear": formulas.linear(8, theta, factor=2.5),
        "ntk": formulas.ntk(8, theta, factor=2.5),
        "theta": formulas.linear(8, formulas.context_theta(theta, native_context=128, context=320), factor=1.0),
        "none": formulas.linear(8, theta, factor=1.0),
    }[rope]
    torch.testing.assert_close(rotary.inv_freq, expected.inv_freq, **FLOAT32_POW)
    assert rotary.attention_scaling == pytest.approx(expected.attention_factor)
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 320
    assert model.generation_config.max_length == 320
    assert report.native_context == 128
    assert report.factor == (1.0 if rope == "none" else 2.5)
    assert report.rope_before == {"rope_type": "default", "rope_theta": theta}
    assert report.rope_after == model.config.rope_parameters
    assert report.rope_after["rope_theta"] >= theta
    assert bool(report.warnings) == (rope == "none")  # positions beyond the native ones, unscaled


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_reloads_with_the_same_logits(family: str, tmp_path) -> None:
    model = tiny_model(family, dtype=torch.float32)
    plain = logits(model)
    report = extend_context(model, context=256, rope="theta" if family == "phi3" else "yarn")
    extended = logits(model)
    assert not torch.allclose(plain, extended, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=report.attention, experts_implementation="eager"
    )
    assert torch.equal(table(again), table(model))
    assert torch.equal(logits(again), extended)
    assert "longfit" not in (tmp_path / "config.json").read_text()  # the attention is chosen at run time


@pytest.mark.parametrize("rope", ["yarn", "linear", "ntk", "theta"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_extending_twice_is_extending_once(family: str, rope: str) -> None:
    once, twice = tiny_model(family), tiny_model(family)
    extend_context(once, context=640, rope=rope)
    extend_context(twice, context=256, rope=rope)
    second = extend_context(twice, context=640, rope=rope)
    torch.testing.assert_close(table(twice), table(once), **FLOAT32_POW)
    if rope in ("yarn", "linear"):  # these record what the model was made for
        assert (second.native_context, second.factor) == (128, 5.0)
        assert twice.config.rope_parameters == once.config.rope_parameters


def test_only_full_attention_layers_of_gemma3_are_extended() -> None:
    model = tiny_model("gemma3")
    sliding = dict(model.config.rope_parameters["sliding_attention"])
    report = extend_context(model, context=512)
    assert model.config.rope_parameters["sliding_attention"] == sliding
    assert model.config.rope_parameters["full_attention"] == report.rope_after
    assert report.rope_after["rope_theta"] == 1e6  # merged, not replaced
    assert report.rope_after["factor"] == 4.0


def test_partial_rotation_is_kept() -> None:
    model = tiny_model("phi3", partial_rotary_factor=0.5)
    extend_context(model, context=256, rope="ntk")
    torch.testing.assert_close(table(model), formulas.ntk(4, 10_000.0, factor=2.0).inv_freq, **FLOAT32_POW)


def test_below_the_present_context_positions_stay() -> None:
    model, tokenizer = tiny_model("llama"), SimpleNamespace(model_max_length=10**30)
    before, rotary = logits(model, 60), model.model.rotary_emb
    report = extend_context(model, tokenizer, context=64, rope="linear")
    assert (report.rope, report.factor, report.warnings) == ("none", 1.0, ())
    assert model.model.rotary_emb is rotary
    assert model.config.max_position_embeddings == 128
    assert tokenizer.model_max_length == 10**30
    # eager attention, the first run's, takes its softmax in float32
    torch.testing.assert_close(logits(model, 60), before, rtol=0, atol=1e-5)


def test_a_cast_rotary_table_is_repaired_in_float32() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    good = table(model).clone()
    model.to(torch.bfloat16)
    assert table(model).dtype == torch.bfloat16
    report = extend_context(model, context=128)
    assert torch.equal(table(model), good)
    assert any("rebuilt" in change for change in report.changes)


def test_reaches_through_a_peft_model() -> None:
    model = tiny_model("qwen2", dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    extend_context(wrapped, context=256)
    expected = tiny_model("qwen2", dtype=torch.float32)
    extend_context(expected, context=256)
    # a fresh adapter adds zero, in another order of additions: a few float32 ulp of logits near 1
    torch.testing.assert_close(logits(wrapped), logits(expected), rtol=0, atol=1e-5)


def test_shifted_attention_reports_its_reach() -> None:
    model = tiny_model("llama")
    report = extend_context(model, context=512, attention="shifted")
    assert (report.group_size, report.attention) == (128, "longfit-shifted-128")
    assert report.reach == 3 * 128 // 2  # two layers
    assert any("at most 192 tokens" in warning for warning in report.warnings)
    assert extend_context(tiny_model("llama"), context=90, attention="shifted").group_size == 22
    assert extend_context(tiny_model("gemma2"), context=64, attention="shifted", group_size=64).reach == 64
    enough = extend_context(tiny_model("llama"), context=512, attention="shifted", group_size=342)
    assert (enough.reach, enough.warnings) == (513, ())


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"rope": "yarm"}, "unknown; allowed are yarn"),
        ({}, {"attention": "s2"}, "unknown; allowed are 'exact'"),
        ({}, {"attention": "shifted", "group_size": 7}, "try group_size 8"),
        ({}, {"group_size": 8}, "exact attention has no groups"),
        ({}, {"theta": 1e6}, "only rope 'theta'"),
        ({}, {"rope": "theta", "theta": 1e3}, "must be above the model's"),
        ({}, {"context": 0}, "at least 1 token"),
        ({"rope_parameters": YARN}, {"rope": "linear"}, "do not compose; try rope 'yarn'"),
        ({"rope_parameters": LLAMA3}, {"rope": "yarn"}, "try rope 'ntk' or 'theta'"),
    ],
)
def test_settings_that_do_not_go_together_change_nothing(settings, arguments, message: str) -> None:
    model = tiny_model("llama", **settings)
    before, attention = model.config.to_dict(), model.config._attn_implementation
    with pytest.raises(ContextError, match=message):
        extend_context(model, **{"context": 256, **arguments})
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == attention


def test_what_the_family_would_not_save_is_refused() -> None:
    model = tiny_model("phi3")
    before = model.config.to_dict()
    with pytest.raises(ContextError, match="does not accept it"):
        extend_context(model, context=256, rope="yarn")
    assert model.config.to_dict() == before


def test_all_sliding_layers_cannot_be_shifted() -> None:
    model = tiny_model("mistral", sliding_window=9)
    with pytest.raises(ContextError, match="every layer"):
        extend_context(model, context=256, attention="shifted")


def test_theta_extends_llama3_scaling_and_dynamic_is_replaced() -> None:
    model = tiny_model("llama", rope_parameters=dict(LLAMA3))
    report = extend_context(model, context=256, rope="theta", theta=1e6)
    assert report.rope_after == {**LLAMA3, "rope_theta": 1e6}
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    report = extend_context(model, context=256, rope="ntk")
    assert report.rope_after == {"rope_type": "default", "rope_theta": formulas.ntk_theta(8, 1e4, factor=2.0)}


def test_a_model_without_rotary_positions_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=32))
    with pytest.raises(ModelError, match="no rotary positions"):
        extend_context(model, context=64)
