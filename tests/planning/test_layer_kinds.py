"""Mixtures of experts: the bytes of a loaded model, to the last one, and the activations of its experts."""

from pathlib import Path

import pytest
import torch
from tests.model_folders import byte_tokenizer
from tests.moe_models import mixture
from tests.planning.meta_run import step_peaks
from transformers import Llama4ForCausalLM, Llama4TextConfig, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from longfit.model.load import load, load_report
from longfit.planning import constant_bytes, per_token_bytes
from longfit.planning.memory import memory_plan
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import read_shape

LLAMA_4 = {
    **{"vocab_size": 258, "hidden_size": 48, "intermediate_size": 40, "intermediate_size_mlp": 56, "head_dim": 12},
    **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2},
    **{"interleave_moe_layer_step": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 257},
}


QWEN_3_5 = {
    **{"vocab_size": 258, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 12, "max_position_embeddings": 64},
    **{"bos_token_id": 256, "eos_token_id": 257},
}


def saved(folder: Path, family: str) -> Path:
    makers = {
        "llama4": lambda: Llama4ForCausalLM(Llama4TextConfig(**LLAMA_4)),
        "qwen3_5": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**QWEN_3_5)),
    }
    model = makers[family]() if family in makers else mixture(family)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4", "qwen3_5"])
@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
def test_weights_are_those_of_the_loaded_model(tmp_path: Path, family: str, quant: str) -> None:
    folder = saved(tmp_path, family)
    model, _ = load(folder, quant=quant, dtype=torch.bfloat16)
    shape = read_shape(folder)
    found = constant_bytes.weights(shape, PlanSettings(64, quant=quant))
    assert found.layers + found.vocabulary + found.rest == load_report(model).total_bytes
    assert 2 * shape.num_params == load_report(model).half_bytes


@pytest.mark.parametrize("kind", ["linear_attention", "full_attention"])
@pytest.mark.parametrize(("context", "tile"), [(4096, 1024), (4096, 2048)])
def test_a_step_of_a_hybrid_holds_what_is_planned(kind: str, context: int, tile: int, monkeypatch) -> None:
    """Two layers of a kind, at the widths of the smallest Qwen3.5 with heads that share keys.

    Five per cent: three that the fit of the gated delta net is off, and two as for other families.
    """
    monkeypatch.setattr(per_token_bytes, "attention_kernel_bytes", lambda shape, settings: 0)
    config = {
        **{"model_type": "qwen3_5_text", "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 3584},
        **{"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256},
        **{"linear_num_key_heads": 8, "linear_num_value_heads": 16, "max_position_embeddings": 262_144},
        **{"layer_types": [kind] * 2, "tie_word_embeddings": True},
    }
    settings = PlanSettings(context, rank=32, offload="pinned", tile=tile, device="cuda")
    plan = memory_plan(read_shape(config), settings)
    found = step_peaks(config, num_tokens=context, tile=tile)
    left_out = ("CUDA context", "gaps", "de-quantised", "optimiser", "Python")
    parts = [c for c in plan.components if c.place == "accelerator" and not c.name.startswith(left_out)]
    planned = max(
        sum(c.by_phase.get(phase, 0) for c in parts) for phase in plan.phases if phase not in ("step", "save")
    )
    assert planned == pytest.approx(found.weights + max(found.forward, found.backward), rel=0.04)
