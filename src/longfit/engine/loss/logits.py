"""Logits a tile at a time: some tokens against a slice of the vocabulary, in memory that all tiles share.

Which tokens and which slices, what a model does to its products before they are logits, and the log-sum-exp over the
whole vocabulary, made online where the vocabulary is cut. What is made of them is in ``linear_cross_entropy.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from longfit.compat.torch import holds_values
from longfit.engine import host_memory
from longfit.engine.hf_model import OutputHead
from longfit.engine.working_memory import CPU_LOGITS, DEVICE_LOGITS
from longfit.numerics.labels import IGNORED


class LogitsBuffers:
    """Memory in which all tiles of logits are made, one after the other: in the dtype of products and of sums.

    A tile of logits is tens of megabytes, in 16 bits and again in float32. Allocated anew for every tile, the narrow
    one comes from the C library's heap, where some small block soon lies in the place it left, so that the next tile
    finds none of its size: 50 to 100 MB of a training step on a CPU were such holes. The wide one comes from the
    system, page after page. Made once and used by all tiles, they cost what they hold, and no page is touched first
    twice.
    """

    def __init__(self, like: Tensor, *, num_logits: int, dtype: torch.dtype, sum_dtype: torch.dtype) -> None:
        """Allocate ``num_logits`` logits on the device of ``like``."""
        self._narrow = host_memory.empty(like, (num_logits,), dtype)
        self._wide = self._narrow if dtype == sum_dtype else host_memory.empty(like, (num_logits,), sum_dtype)

    def products(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``hidden weight^T + bias`` in their own dtype, [t, D], [v, D] -> [t, v]; over the tile before."""
        narrow = self._part(self._narrow, len(hidden), len(weight))
        if bias is None:
            torch.mm(hidden, weight.t(), out=narrow)
        else:
            torch.addmm(bias, hidden, weight.t(), out=narrow)
        return narrow

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``products`` in the dtype of the sums."""
        narrow = self.products(hidden, weight, bias)
        return narrow if self._wide is self._narrow else self._part(self._wide, *narrow.shape).copy_(narrow)

    def narrowed(self, logits: Tensor) -> Tensor:
        """A tile of these buffers in the dtype of the products, [t, v]."""
        return logits if self._wide is self._narrow else self._part(self._narrow, *logits.shape).copy_(logits)

    def _part(self, memory: Tensor, rows: int, columns: int) -> Tensor:
        return memory[: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class TiledHead:
    """The map from hidden states to logits, asked for one tile of tokens and one slice of the vocabulary at a time."""

    weight: Tensor  # [V, D] in the compute dtype
    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float
    sum_dtype: torch.dtype
    buffers: LogitsBuffers | None = None  # where the logits of training are made

    @classmethod
    def of(cls, head: OutputHead, dtype: torch.dtype) -> Self:
        """The output matrix and bias of a model in the dtype that products run in."""
        bias = None if head.bias is None else head.bias.to(dtype)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        return cls(head.weight.to(dtype), bias, head.softcap, head.scale, sum_dtype)

    def logits(self, hidden: Tensor, vocab_slice: slice) -> Tensor:
        """Logits of some tokens for a slice of the vocabulary, in the dtype of the sums: [t, D] -> [t, v]."""
        bias = None if self.bias is None else self.bias[vocab_slice]
        if self.buffers is None:
            logits = F.linear(hidden, self.weight[vocab_slice], bias).to(self.sum_dtype)
        else:
            logits = self.buffers.logits(hidden, self.weight[vocab_slice], bias)
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """d logits / d (h W^T + b) where it is not the constant ``scale``: the derivative of the soft cap."""
        return None if self.softcap is None else (logits / self.softcap).square_().neg_().add_(1.0)


@dataclass(frozen=True)
class LossTiles:
    """Which tokens are computed, and how many of them and of the vocabulary at once."""

    rows: Tensor  # [M] int64: the rows whose label counts
    token_tile: int
    vocab_tile: int
    vocab_size: int

    @classmethod
    def choose(cls, labels: Tensor, vocab_size: int, *, token_tile: int | None, vocab_tile: int | None) -> Self:
        """Prefer the whole vocabulary for fewer tokens: then the logits of the forward sum also serve the gradient.

        Raises: ValueError: a size below 1, or a label that is no token id.
        """
        for name, value in (("token_tile", token_tile), ("vocab_tile", vocab_tile)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1; leave it out to let the engine choose")
        elements = CPU_LOGITS if labels.device.type == "cpu" else DEVICE_LOGITS
        if token_tile is None:
            token_tile = max(128, min(1024, elements // (vocab_tile or vocab_size)))
        if vocab_tile is None:
            vocab_tile = max(1, min(vocab_size, elements // token_tile))
        return cls(_trained_rows(labels, vocab_size), token_tile, min(vocab_tile, vocab_size), vocab_size)

    def tokens(self) -> Iterator[Tensor]:
        """The rows of each tile."""
        return iter(self.rows.split(self.token_tile) if len(self.rows) else ())

    def vocab_slices(self) -> list[slice]:
        """The slices that cover the vocabulary."""
        return [
            slice(start, min(start + self.vocab_tile, self.vocab_size))
            for start in range(0, self.vocab_size, self.vocab_tile)
        ]


def _trained_rows(labels: Tensor, vocab_size: int) -> Tensor:
    if not holds_values(labels):  # where memory is counted: all of them, which cost the most
        return torch.arange(len(labels), device=labels.device)
    rows = (labels != IGNORED).nonzero().squeeze(1)
    if len(rows):
        low, high = labels[rows].aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"labels from {int(low)} to {int(high)}: must be token ids below {vocab_size}, or {IGNORED} for a "
                "token that is not trained on; check that tokenizer and model belong together"
            )
    return rows


def label_logits(logits: Tensor, labels: Tensor, vocab_slice: slice) -> Tensor:
    """The label's logit where the label lies in ``vocab_slice``, else 0: [t, v], [t] -> [t]."""
    local = labels - vocab_slice.start
    here = (local >= 0) & (local < logits.shape[1])
    found = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    return torch.where(here, found, 0.0)


def log_sum_exp(head: TiledHead, hidden: Tensor, labels: Tensor, tiles: LossTiles) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the whole vocabulary and the label's logit, one vocabulary tile at a time: each [t]."""
    total = hidden.new_full((len(hidden),), -torch.inf, dtype=head.sum_dtype)
    label = torch.zeros_like(total)
    for vocab_slice in tiles.vocab_slices():
        logits = head.logits(hidden, vocab_slice)
        label += label_logits(logits, labels, vocab_slice)
        total = torch.logaddexp(total, logits.logsumexp(1))
    return total, label
