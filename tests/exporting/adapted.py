"""Small models of every family that GGUF is written for, each with an adapter of random values, as folders."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longfit.model.gguf_split_rules import CASED, REST, REST_SLASH, WORDS
from longfit.model.save import save_adapter

TEXT = "The year 1984 was hot, said Zoë; def f(x):\n    return x ** 2  # 3.14159\n\n\tnaïve ünïcode… 日本語 don't we'll"
SIZE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 24}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
    "long_factor": [1.0 + i / 4 for i in range(8)], "short_factor": [1.0 + i / 8 for i in range(8)],
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "llama, linear": ("Llama", {"rope_parameters": LINEAR, "hidden_size": 96, "num_attention_heads": 6}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", {**GEMMA, "num_hidden_layers": 6, "head_dim": 32, "query_pre_attn_scalar": 32}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3, longrope": (
        "Phi3",
        {"sliding_window": None, "rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
}


def byte_level(*steps: Any, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer whose rule is made of ``steps``."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps]) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<s>", "</s>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT, "the year the year we'll don't said said 19 84 198 return return"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


RULES = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False),),
    "smollm": (pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama-bpe": (
        pre_tokenizers.Split(Regex(f"{WORDS}|\\p{{N}}{{1,3}}|{REST}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ),
    "qwen2": (
        pre_tokenizers.Split(Regex(f"{WORDS}|\\p{{N}}|{REST}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ),
    "tekken": (
        pre_tokenizers.Split(Regex(f"{CASED}|\\p{{N}}|{REST_SLASH}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ),
}
"""How published tokenizers split a text before they merge, under llama.cpp's names."""


def gpt2_rule() -> PreTrainedTokenizerFast:
    """The plainest rule."""
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def sentencepiece() -> PreTrainedTokenizerFast:
    """BPE over characters that falls back to bytes, as Llama-2, Mistral and Gemma have it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the year the year said said return return we will do this"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return _plain_bytes(fast)


def _plain_bytes(fast: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Byte tokens are ordinary tokens of the vocabulary, not special ones that a text could spell out."""
    state = json.loads(fast.backend_tokenizer.to_str())
    state["added_tokens"] = [added for added in state["added_tokens"] if not added["content"].startswith("<0x")]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_adapted(folder: Path, family: str, *, tokenizer: Any = None, **lora: Any) -> tuple[Any, Any]:
    """Write ``base`` and ``adapter``; returns the model with its adapter, float32, and the tokenizer."""
    if tokenizer is None:
        tokenizer = byte_level(*RULES["qwen2"]) if family == "qwen2" else gpt2_rule()
    name, options = FAMILIES[family]
    settings = {**SIZE, "vocab_size": len(tokenizer) + 4, "pad_token_id": 0, **options}
    settings |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if name == "Phi3":
        del settings["head_dim"]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    _spread(model)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **lora)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    save_adapter(adapted, tokenizer, folder / "adapter")
    return adapted, tokenizer


def _spread(model: torch.nn.Module) -> None:
    """Weights large enough that scores differ, norms and biases off their constants: what is forgotten shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(5)
