"""A tiny Llama and a tokenizer of bytes, as users have them in a folder."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens a language model needs."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = {"<s>": len(alphabet), "</s>": len(alphabet) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | special, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def llama(*, tied: bool = False, dtype: torch.dtype = torch.bfloat16, **options):
    """Two layers with random weights, native context 64; further fields of the config win."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    config = LlamaConfig(tie_word_embeddings=tied, **shape | options)
    return LlamaForCausalLM(config).to(dtype)


def save_model(folder: Path, *, dtype: torch.dtype = torch.bfloat16, **options) -> Path:
    """Write the Llama and the tokenizer, as a base model that every command takes; returns the folder."""
    llama(dtype=dtype, **options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
