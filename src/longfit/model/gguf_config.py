"""What a GGUF file says about its model and transformers does not read: biases, head size, Gemma's scores, padding.

Positions are a subject of their own (``gguf_positions.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longfit.files.gguf_header import read_header

LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the largest model of a generation, which divides its scores by another number than all others."""


def complete_config(path: Path, config: Any) -> None:
    """Put what transformers has left out into the configuration that it made, in place."""
    header = read_header(path)
    keys = header.keys
    head_size = keys.get(f"{keys.get('general.architecture')}.attention.key_length")
    if head_size is not None and hasattr(config, "head_dim"):
        config.head_dim = int(head_size)
    if hasattr(config, "attention_bias"):
        config.attention_bias = config.attention_bias or "blk.0.attn_output.bias" in header.tensors
    if hasattr(config, "mlp_bias"):
        config.mlp_bias = config.mlp_bias or "blk.0.ffn_down.bias" in header.tensors
    if config.model_type in LARGEST_GEMMA:
        config.query_pre_attn_scalar = gemma_query_scalar(config)
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        config.pad_token_id = keys.get("tokenizer.ggml.padding_token_id")


def gemma_query_scalar(config: Any) -> float:
    """What llama.cpp divides Gemma's squared scores by: the head size, but for the largest model of a generation."""
    if config.num_hidden_layers == LARGEST_GEMMA[config.model_type]:
        return float(config.hidden_size / config.num_attention_heads)
    return int(config.head_dim)
