"""Which attention a model is trained and measured with: longfit's exact one where the model runs with it, else its own.

A model *runs* with it if a probe goes through and no token sees a later one: some families compute attention themselves
and only ask for a mask, which longfit does not build.
"""

import warnings
from typing import Any

import torch
from torch import nn

from longfit.attention.hf_attention import attention_key
from longfit.compat.transformers import attention_of, supports_sdpa
from longfit.engine.hf_model import base_model
from longfit.engine.sweep.probe import ModelNature, Present, nature_of
from longfit.errors import ModelError


def take_exact_attention(
    model: nn.Module, *, present: Present | None = None, device: torch.device | None = None, again: bool = False
) -> ModelNature:
    """Give a model longfit's exact attention unless it has one of longfit's, or leave its own and warn of it.

    Args: those of ``nature_of``.
    Returns: what the model does with the attention that it has now.
    Raises: ModelError: it does not run at all, or has shifted attention and does not run with that.
    """
    base = base_model(model)
    before = attention_of(base)
    if not before.startswith("longfit-"):
        base.set_attn_implementation(attention_key())
    try:
        nature = nature_of(model, present=present, device=device, again=again)
        if nature.causal is None or not attention_of(base).startswith("longfit-"):
            return nature
        problem = ModelError(f"{nature.causal} with attention {attention_of(base)!r}")
    except ModelError as error:
        problem = error
    _back_to_own_attention(base, before, problem)
    return nature_of(model, present=present, device=device, again=again)


def _back_to_own_attention(base: Any, before: str, problem: ModelError) -> None:
    """Give a model that does not run with longfit's exact attention one of transformers', and say so.

    Raises: ModelError: ``problem`` itself, when shifted attention was asked for, which only longfit has.
    """
    if before.startswith("longfit-shifted"):
        raise problem
    possible = (key for key in (before, "sdpa", "eager") if not key.startswith("longfit-"))
    key = next(key for key in possible if key != "sdpa" or supports_sdpa(base))
    base.set_attn_implementation(key)
    warnings.warn(f"{problem}; attention {key!r} is used instead, and layers are not swept", stacklevel=4)
