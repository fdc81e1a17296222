"""The state of a parameter as whole tensors, as a checkpoint wants it, put together from pages and taken apart again.

State that lives in a file may not fit into memory. The whole tensors of such a state are a mapping of a nameless file
beside it: whoever saves them reads them through, and the kernel may drop every page of them at any time.
"""

import errno
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longfit.optim.elements import take
from longfit.optim.page_layout import ParameterRun, StateFormat

NewValues = Callable[[int, torch.dtype], Tensor]

_SMALLEST_IN_FILE = 1 << 20  # bytes; below this a file costs more than it saves


def whole_state(numel: int, form: StateFormat, *, new_values: NewValues) -> dict[str, Tensor]:
    """Return the fields of a parameter's state, flat, all zeros."""
    return {field.name: new_values(field.count(numel), field.dtype) for field in form.fields}


def zeros_in_file(folder: Path, count: int, dtype: torch.dtype) -> Tensor:
    """Return ``[count]`` zeros, mapped from a nameless file in the folder if they are many.

    Raises: OSError: the disk is full, or the process may not have so much memory.
    """
    num_bytes = count * dtype.itemsize
    if num_bytes < _SMALLEST_IN_FILE:
        return torch.zeros(count, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".longfit-state-") as file:
        if sys.platform == "linux":
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # a disk that is full shows here, not when it is written
        try:
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype)
        except RuntimeError as error:  # the file is there and has its size: the process may not map so much
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), file.name) from error


def collect(run: ParameterRun, frame: Tensor, into: dict[str, Tensor]) -> None:
    """Copy a run's state out of its page, to its place in the parameter's whole state."""
    for field in run.format.fields:
        begin = run.start // field.elements_per_value
        view = run.views(frame)[field.name]
        into[field.name][begin : begin + view.numel()].copy_(view)


def scatter(run: ParameterRun, saved: dict[str, Any], frame: Tensor) -> None:
    """Copy a run's part of a saved state into its page; what was not saved becomes zero, which is a new state."""
    for field in run.format.fields:
        view = run.views(frame)[field.name]
        if field.name not in saved:
            view.zero_()
            continue
        begin = run.start // field.elements_per_value
        view.copy_(take(saved[field.name], begin, begin + view.numel()))
