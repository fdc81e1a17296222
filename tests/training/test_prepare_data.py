"""From settings to tokens without what only a model needs."""

import subprocess
import sys


def test_counting_tokens_starts_without_what_only_models_need() -> None:
    """PEFT and transformers' model code cost more than all else of a start."""
    heavy = "{'peft', 'bitsandbytes', 'transformers.modeling_utils', 'torch._dynamo', 'longfit.engine.sweep.install'}"
    code = f"import sys, longfit.training.prepare_data; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_model_is_entered_without_importing_peft() -> None:
    code = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
from longfit.engine.hf_model import base_model, decoder
model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1))
assert base_model(model) is model and decoder(model) is model.model
print("peft" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
