"""Reports: one way to learn what was done to a model, also by other tools."""

from peft import LoraConfig, get_peft_model
from tests.tiny_models import tiny_model

import longfit


def test_everything_that_was_done_is_told() -> None:
    model = tiny_model("llama", max_position_embeddings=64)
    before = longfit.reports(model)
    assert (before.context, before.adapters, before.sweep) == (None, None, None)
    extended = longfit.extend_context(model, context=128, rope="yarn")
    adapted = longfit.add_adapters(model, rank=4)
    swept = longfit.enable_sweep(adapted, tile=16, offload="file")
    after = longfit.reports(adapted)
    assert after.context is extended
    assert after.sweep is swept
    assert after.adapters is not None
    assert len(after.adapters.adapted) == 14
    told = str(after)
    assert "no layer is quantised" in told
    assert "config.max_position_embeddings 64 -> 128" in told
    assert f"{after.adapters.trainable_params:,} of" in told
    assert "sweeping 2 layers, 16 tokens at a time, layer inputs in a file in" in told
    longfit.disable_sweep(adapted)
    assert longfit.reports(adapted).sweep is None


def test_a_model_made_elsewhere_is_reported_too() -> None:
    model = get_peft_model(tiny_model("qwen3"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    report = longfit.reports(model)
    assert report.adapters is not None
    assert len(report.adapters.adapted) == 2
    assert report.load.dense
