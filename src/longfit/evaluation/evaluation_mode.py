"""The state in which a model is measured: eval mode, exact attention, nothing recorded; and back as it was.

Training may use shifted attention, dropout, checkpointing. A number that is compared must not depend on them. With
``swept=True`` the layers run tile by tile (``engine/sweep``), so that a long window costs two hidden states a token
and the keys of one layer, not the activations of all its tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from longfit.attention.hf_attention import attention_key
from longfit.compat.transformers import attention_of
from longfit.engine.hf_model import base_model
from longfit.engine.model_state import preserve_state
from longfit.engine.sweep.evaluation import swept_evaluation
from longfit.engine.sweep.install import enable_sweep
from longfit.engine.sweep.sweeper import sweeper_of
from longfit.errors import DataError, ModelError


@contextmanager
def measured(model: nn.Module, *, swept: bool = False) -> Iterator[None]:
    """Evaluate a model exactly inside the block, and leave it as it was.

    Args:
        model: a transformers causal language model, or a PeftModel around one.
        swept: run the layers tile by tile; only without a key/value cache.
    Raises: ModelError: the model is no causal language model, or takes no attention but its own.
    """
    base = base_model(model)
    attention = attention_of(base)
    with preserve_state(model), torch.no_grad():
        model.eval()
        if not str(attention).startswith("longfit-"):
            use_attention(base, attention_key())
        if not swept:
            yield
            return
        if sweeper_of(model) is None:
            enable_sweep(model)
        with swept_evaluation(model):
            yield


def use_attention(base: Any, key: str) -> None:
    """Set a model's attention, and make sure that it took it.

    Raises: ModelError: it did not.
    """
    base.set_attn_implementation(key)
    if attention_of(base) != key:
        raise ModelError(
            f"{type(base).__name__}: takes no attention from transformers' AttentionInterface, so it cannot be measured"
            " in tiles; use a model that does, as Llama, Qwen, Mistral, Gemma and Phi do"
        )


def require_known(token_ids: Tensor, num_words: int) -> None:
    """Raise DataError unless the model has a word for every token."""
    if not len(token_ids):
        return
    low, high = (int(found) for found in token_ids.aminmax())
    if low < 0 or high >= num_words:
        raise DataError(
            f"token_ids: run from {low} to {high}, the model knows 0 to {num_words - 1}; use its own tokenizer"
        )
