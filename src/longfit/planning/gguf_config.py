"""The model configuration in a GGUF file's header, read without the file's tensors and without the ``gguf`` package.

That package turns the whole vocabulary into Python objects, which takes seconds; a plan needs a dozen numbers.
What this is not: the format itself is read and checked in ``files/gguf_header.py``.
"""

from pathlib import Path
from typing import Any

from longfit.errors import ModelError
from longfit.files.gguf_header import read_header

# GGUF's name of an architecture -> transformers' model_type, for those whose shapes are planned.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}


def gguf_config(path: Path) -> dict[str, Any]:
    """Return the header as a Hugging Face configuration, as far as a plan needs it.

    Raises: ModelError: not a GGUF file, or of an architecture that is not planned.
    """
    header = read_header(path)
    keys = header.keys
    architecture = str(keys.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{path}: architecture {architecture!r} is not one that can be planned; allowed: {known}")

    def key(name: str) -> Any:
        return keys.get(f"{architecture}.{name}")

    vocab_size = key("vocab_size") or keys.get("tokenizer.ggml.tokens")
    config = {
        "model_type": ARCHITECTURES[architecture],
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": key("attention.key_length"),
        "vocab_size": int(vocab_size) if isinstance(vocab_size, int) else len(vocab_size or ()),
        "max_position_embeddings": key("context_length"),
        "sliding_window": key("attention.sliding_window"),
        "attn_logit_softcapping": key("attn_logit_softcapping"),
        "final_logit_softcapping": key("final_logit_softcapping"),
        "num_experts": key("expert_count"),  # Mixtral calls itself a llama
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    return {name: value for name, value in config.items() if value is not None}
