"""Mixtures of experts: the bytes of a loaded model, to the last one, and the activations of its experts."""

from pathlib import Path

import pytest
import torch
from tests.model_folders import byte_tokenizer
from tests.moe_models import mixture
from transformers import Llama4ForCausalLM, Llama4TextConfig

from longfit.model.load import load, load_report
from longfit.planning import constant_bytes
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import read_shape

LLAMA_4 = {
    **{"vocab_size": 258, "hidden_size": 48, "intermediate_size": 40, "intermediate_size_mlp": 56, "head_dim": 12},
    **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2},
    **{"interleave_moe_layer_step": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 257},
}


def saved(folder: Path, family: str) -> Path:
    model = Llama4ForCausalLM(Llama4TextConfig(**LLAMA_4)) if family == "llama4" else mixture(family)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
def test_weights_are_those_of_the_loaded_model(tmp_path: Path, family: str, quant: str) -> None:
    folder = saved(tmp_path, family)
    model, _ = load(folder, quant=quant, dtype=torch.bfloat16)
    shape = read_shape(folder)
    found = constant_bytes.weights(shape, PlanSettings(64, quant=quant))
    assert found.layers + found.vocabulary + found.rest == load_report(model).total_bytes
    assert 2 * shape.num_params == load_report(model).half_bytes
