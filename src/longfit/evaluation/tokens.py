"""Text to tokens and back, the same in every measurement."""

from typing import Any

import torch
from torch import Tensor

from longfit.data.tokenizing_border import tokenizing


def encode(tokenizer: Any, text: str) -> Tensor:
    """Text as tokens ``[N]`` int64, with what the tokenizer puts before a text but not with an end token."""
    with tokenizing(tokenizer):
        ids = tokenizer(text, verbose=False).input_ids
    return torch.tensor(ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids, dtype=torch.int64)


def decode(tokenizer: Any, token_ids: list[int]) -> str:
    """Tokens as text, special tokens left out and spaces left as they are."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
