"""The text of the experiments: what every Python carries, so that anyone can repeat them offline.

Trained on: the language reference behind ``help()``, and sources of the standard library. Held out: other sources.
A pretrained model has met such text before; that moves all rows of a table alike.
"""

import importlib
import inspect
import pydoc_data.topics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longfit.evaluation.perplexity import perplexity

TRAINING_MODULES = ("inspect", "pydoc", "unittest.mock", "pickletools", "zipfile", "subprocess", "typing", "mailbox")
HELD_OUT_MODULES = ("tarfile", "doctest", "argparse", "turtle", "_pydecimal")


def source(module: str, tokenizer: Any) -> Tensor:
    """The source of a module of the standard library as tokens ``[N]``."""
    return _tokens(inspect.getsource(importlib.import_module(module)), tokenizer)


def reference(tokenizer: Any) -> Tensor:
    """The language reference as tokens ``[N]``. It repeats itself from topic to topic, so no part of it is held out."""
    return _tokens("\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())), tokenizer)


def training_windows(tokenizer: Any, *, window: int, number: int, seed: int) -> list[Tensor]:
    """Windows of training text, in an order that the seed decides; begun again only when all were read.

    Returns: ``number`` windows of ``[window]`` tokens; a window lies within one document.
    """
    documents = [reference(tokenizer), *(source(name, tokenizer) for name in TRAINING_MODULES)]
    windows = [ids[start : start + window] for ids in documents for start in range(0, len(ids) - window + 1, window)]
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < number:
        order += torch.randperm(len(windows), generator=draw).tolist()
    return [windows[index] for index in order[:number]]


def held_out_documents(tokenizer: Any, names: Sequence[str], *, tokens: int) -> dict[str, Tensor]:
    """The first ``tokens`` tokens of sources.

    Raises: ValueError: a source is shorter.
    """
    found = {}
    for name in names:
        ids = source(name, tokenizer)
        if len(ids) < tokens:
            raise ValueError(f"held-out document {name}: has {len(ids):,} tokens, {tokens:,} are needed")
        found[name] = ids[:tokens]
    return found


def held_out_losses(model: nn.Module, documents: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean loss of each document, each read as one window with exact attention."""
    return {name: perplexity(model, ids, window=len(ids), stride=len(ids)).nll for name, ids in documents.items()}


def _tokens(text: str, tokenizer: Any) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False).input_ids)
