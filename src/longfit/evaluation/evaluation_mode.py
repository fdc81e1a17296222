"""The state in which a model is measured: eval mode, exact attention, nothing recorded; and back as it was.

Exact is longfit's attention where the model runs with it, else the model's own.

Training may use shifted attention, dropout, checkpointing. A number that is compared must not depend on them. With
``swept=True`` the layers run tile by tile (``engine/sweep``), so that a long window costs two hidden states a token
and the keys of one layer, not the activations of all its tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from longfit.engine.model_state import preserve_state
from longfit.engine.sweep.attention_choice import take_exact_attention
from longfit.engine.sweep.evaluation import swept_evaluation
from longfit.engine.sweep.install import enable_sweep
from longfit.engine.sweep.sweeper import sweeper_of
from longfit.errors import DataError


@contextmanager
def measured(model: nn.Module, *, swept: bool = False) -> Iterator[None]:
    """Evaluate a model exactly inside the block, and leave it as it was.

    Args:
        model: a transformers causal language model, or a PeftModel around one.
        swept: run the layers tile by tile; only without a key/value cache.
    Raises: ModelError: the model is no causal language model, or does not run.
    """
    with preserve_state(model), torch.no_grad():
        model.eval()
        sweeper = sweeper_of(model)
        take_exact_attention(model, present=None if sweeper is None else sweeper.present)
        if not swept:
            yield
            return
        if sweeper is None:
            enable_sweep(model)
        with swept_evaluation(model):
            yield


def require_known(token_ids: Tensor, num_words: int) -> None:
    """Raise DataError unless the model has a word for every token."""
    if not len(token_ids):
        return
    low, high = (int(found) for found in token_ids.aminmax())
    if low < 0 or high >= num_words:
        raise DataError(
            f"token_ids: run from {low} to {high}, the model knows 0 to {num_words - 1}; use its own tokenizer"
        )
