"""The text that the drift of an export is measured on: short windows, spread over what the model did not train on."""

from __future__ import annotations

import inspect
import tarfile
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longfit.errors import DataError
from longfit.evaluation.compare import Text, read_text, short_windows
from longfit.evaluation.tokens import encode
from longfit.exporting.trained import Trained
from longfit.training.prepare_data import read_token_ids

WINDOW = 1024  # tokens with something to read before them; four windows say more about a text than one of four thousand


@dataclass(frozen=True)
class HeldOut:
    """Windows of int64 tokens, where they came from, and whether the run says that it did not train on them."""

    name: str
    windows: tuple[Tensor, ...]
    held_out: bool


def held_out_windows(trained: Trained, text: str | None, tokens: int) -> HeldOut:
    """About ``tokens`` tokens: of the text given, else of the run's held-out text, else of one that Python carries.

    Raises: DataError: it cannot be read, or has no two tokens.
    """
    if tokens < 2:
        raise DataError(f"tokens {tokens}: at least 2 are needed to measure anything")
    found = _read(trained, trained.tokenizer(), text)
    longest = max((len(ids) for ids in found.documents), default=0)
    if longest < 2:
        raise DataError(f"{found.name}: no text of two tokens in it; give another with --text")
    context = trained.config.context.context if trained.config is not None else None
    window = min(WINDOW, longest, tokens, context or WINDOW)
    return HeldOut(found.name, tuple(short_windows(found.documents, window, tokens)), found.held_out)


def _read(trained: Trained, tokenizer: Any, text: str | None) -> Text:
    if trained.config is not None:
        return read_text(trained.config, tokenizer, text)
    if text is not None:
        return Text(tuple(read_token_ids(text, tokenizer)), text, False)
    return Text((encode(tokenizer, inspect.getsource(tarfile)),), "the source code of Python's tarfile module", False)
