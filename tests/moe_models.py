"""Tiny mixtures of experts of the shapes that people train, in folders; no block size divides their rows."""

from pathlib import Path

import torch
from tests.model_folders import byte_tokenizer
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SHAPE = {
    "vocab_size": 258,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "num_experts_per_tok": 2,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "intermediate_size": 40}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": 8, "moe_intermediate_size": 20, "intermediate_size": 40, "mlp_only_layers": [0]},
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"num_local_experts": 4, "intermediate_size": 40, "sliding_window": 8},
    ),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
        | {"moe_intermediate_size": 24, "intermediate_size": 40, "num_key_value_heads": 4}
        | LATENT
        | {"head_dim": 8},
    ),
    "nemotron_h": (
        NemotronHForCausalLM,
        NemotronHConfig,
        {"layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "moe_intermediate_size": 20}
        | {"moe_shared_expert_intermediate_size": 24, "intermediate_size": 40},
    ),
}
"""Gate and up in one, both ways round, with biases; a gate of its own; dense layers first; experts without a gate."""


def mixture(family: str, *, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A model with random weights; routers that do not send all tokens one way. Further fields of the config win."""
    torch.manual_seed(0)
    model_class, config_class, options = FAMILIES[family]
    model = model_class(config_class(**SHAPE | options | changes)).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def save_mixture(folder: Path, family: str) -> Path:
    """Write a model and a tokenizer of bytes, as a base that ``load`` takes; returns the folder."""
    mixture(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
