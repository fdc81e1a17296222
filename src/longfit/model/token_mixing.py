"""Whether a family carries a state from token to token besides attention, told from its configuration alone.

A run finds out by running some tokens (``engine/sweep/probe.py``). To count a run's windows without its weights, the
layers' structure has to do: the model is made on the meta device, where it takes no memory. A test holds the two
against each other.
"""

import copy
import inspect
import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from longfit.engine.hf_model import decoder

IN_A_LAYER = re.compile(r"(^|\.)(layers|layer|blocks|h)\.\d+\.")  # not what turns pictures or sound into tokens
STATEFUL = re.compile(
    r"Mamba|GatedDelta|DeltaNet|ShortConv|Recurrent|RWKV|Rwkv|xLSTM|LinearAttention|LightningAttention|SSM"
)
STATE = "carries a state from token to token"


def carries_state(config: Any) -> str | None:
    """Say which module of a model with this configuration keeps documents from sharing a window; None for none.

    None, too, for a model that has no causal language model of its own in transformers; its run will tell.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except ValueError:
        return None
    inner = decoder(model)
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return f"{type(inner).__name__} takes no position_ids, by which documents are told apart"
    for name, module in inner.named_modules():
        kind = type(module).__name__
        if IN_A_LAYER.search(name) and (isinstance(module, nn.Conv1d) or STATEFUL.search(kind)):
            return f"{name} ({kind}) {STATE}"
    return None
