"""Two-layer random models of eight transformers families, small enough for float64, odd enough to catch an assumption.

Six query heads on two key/value heads by default (three query heads share one, and half of six cuts such a group); the
Gemma families carry a sliding window of nine tokens on some layers, Gemma-2 a soft cap on scores and logits. Experts
run in plain loops, because the grouped kernels do not exist for float64.
"""

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 97
SLIDING_WINDOW = 9

_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "sliding_window": SLIDING_WINDOW,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
FAMILIES = tuple(_FAMILIES)


def tiny_model(
    family: str,
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    attn_implementation: str = "eager",
    seed: int = 0,
    **config: Any,
) -> nn.Module:
    """Build a random causal language model of one family, in train mode, without dropout.

    Args:
        family: one of ``FAMILIES``.
        num_heads, num_kv_heads: query and key/value heads; the head dimension is always 8.
        dtype: parameter dtype.
        attn_implementation: a key that transformers knows.
        seed: of the weights; equal seeds give equal weights whatever the attention.
        config: further fields of the family's config; they win.
    Returns: the model, vocabulary ``VOCABULARY``, native context 128.
    """
    config_class, model_class, extra = _FAMILIES[family]
    settings = {
        "hidden_size": 8 * num_heads,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **extra,
        **config,
    }
    if family == "phi3":
        del settings["head_dim"]  # derived
    model_config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)._from_config(
        model_config, attn_implementation=attn_implementation, experts_implementation="eager"
    )
    _scatter_norms(model)
    rotary = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model = model.to(dtype)
    for name, buffer in model.named_buffers():  # loading a model keeps rotary tables float32; casting one does not
        if name in rotary:
            buffer.data = rotary[name]
    return model.train()


def _scatter_norms(model: nn.Module) -> None:
    """Move one-dimensional weights (norms, biases) off the constant they start from, so that a forgotten one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
