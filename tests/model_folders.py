"""A tiny Llama and a tokenizer of bytes, as users have them in a folder."""

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


def llama(*, tied: bool = False, hidden_size: int = 64, dtype: torch.dtype = torch.bfloat16, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=258,
        max_position_embeddings=64,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=tied,
        **options,
    )
    return LlamaForCausalLM(config).to(dtype)
