"""Keeps a float64 model in float64: transformers computes norms, softmax, routers and recurrences in float32 whatever
the dtype, which hides an error of 1e-9 from a test.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def exact_float64() -> Iterator[None]:
    """Let nothing make float32 of a float64 tensor while this lasts, in forward and in backward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", _kept(Tensor.float))
        patch.setattr(Tensor, "to", _kept(Tensor.to))
        patch.setattr(Tensor, "type", _kept(Tensor.type))
        patch.setattr(F, "softmax", _kept(F.softmax))
        yield


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(tensor: Tensor, *args: Any, **options: Any) -> Any:
        if tensor.dtype != torch.float64:
            return function(tensor, *args, **options)
        if function is FLOAT:
            return tensor
        args = tuple(torch.float64 if part is torch.float32 else part for part in args)
        options = {name: torch.float64 if part is torch.float32 else part for name, part in options.items()}
        return function(tensor, *args, **options)

    return call


FLOAT = Tensor.float
