"""Gradients of a layer's parameters, added up over its tiles."""

from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from longfit.engine import host_memory


class GradSums:
    """Parameter gradients of all tiles, added in float32 (float64 for float64); None where none ever came.

    They lie in one piece a layer, as they live until the optimiser steps: a small block in the heap would spoil the
    place of a large one.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)
        self._dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        self._ends = list(accumulate(p.numel() for p in parameters))
        self._all = host_memory.empty(parameters[0].detach(), (self._ends[-1],), self._dtype) if parameters else None

    def add(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Add one tile's gradients, in the order of the parameters; None is no gradient."""
        for number, gradient in enumerate(gradients):
            total = self._sums[number]
            if gradient is None:
                continue
            if total is not None:
                total += gradient
                continue
            assert self._all is not None, "gradients of nothing"
            end = self._ends[number]
            self._sums[number] = self._all[end - gradient.numel() : end].view(gradient.shape).copy_(gradient)

    def totals(self) -> list[Tensor | None]:
        """The sums, each in the dtype that its parameter wants its gradient in."""
        return [
            None if total is None else total.to(parameter.grad_dtype or parameter.dtype)
            for total, parameter in zip(self._sums, self._parameters, strict=True)
        ]
