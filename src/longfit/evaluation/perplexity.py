"""Perplexity of a model on long text, over all and by position in the window, always with exact attention.

Two numbers are comparable only if they score the same tokens with the same context before them. The result therefore
names its convention; two are offered and never mixed:

    document    each document on its own; a window scores only the tokens that no window scored before; every scored
                token counts alike. The stride says how much context the first of them has: ``window - stride`` tokens.
                (YaRN, arXiv 2309.00071, section 4.3, and the Hugging Face documentation.)
    longlora    whole windows only, one every ``stride`` tokens; each scores all its tokens but the first, so that
                overlapping windows score a token again; the mean over windows. (LongLoRA's ``eval.py``, stride 256.)

Perplexity by position shows where a model stops reading: beyond the native context of a base it explodes. It does not
show whether distant text is *used*; that is what retrieval tests are for (``passkey.py``).

Documents are never joined, in either convention; LongLoRA's script ran its windows over one stream of all documents.
Layers run tile by tile and logits exist for one tile at a time, so that the window may be long: a token costs a few
hidden states, and its keys and values in one layer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longfit.engine.hf_model import hidden_states, output_head
from longfit.engine.loss.linear_cross_entropy import token_losses
from longfit.engine.sweep.probe import nature_of
from longfit.errors import ConfigError, DataError
from longfit.evaluation.evaluation_mode import measured, require_known

CONVENTIONS = ("document", "longlora")


@dataclass(frozen=True)
class Bucket:
    """The scored tokens at positions ``[start, stop)`` of their windows: mean loss in nats, and its exponential."""

    start: int
    stop: int
    num_tokens: int
    nll: float
    perplexity: float


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity with all that it depends on.

    Attributes:
        perplexity: ``exp(nll)``.
        nll: mean negative log-likelihood of a token, in nats.
        num_tokens: scored, repetitions counted.
        num_windows: read.
        num_documents: of which at least one token was scored.
        unread_tokens: in no window: documents and ends of documents that are too short for the convention.
        convention, window, stride: as asked for.
        by_position: buckets that hold a token, in order.
        by_window: mean negative log-likelihood of each window's scored tokens, in order; for comparing two models
            window by window.
    """

    perplexity: float
    nll: float
    num_tokens: int
    num_windows: int
    num_documents: int
    unread_tokens: int
    convention: str
    window: int
    stride: int
    by_position: tuple[Bucket, ...]
    by_window: tuple[float, ...]


class ScoredWindow(NamedTuple):
    """Tokens ``[start, stop)`` of a document are read; those from ``first_scored`` on count."""

    document: int
    start: int
    stop: int
    first_scored: int


def perplexity(
    model: nn.Module,
    token_ids: Tensor | Sequence[Tensor],
    *,
    window: int,
    stride: int,
    convention: str = "document",
    bucket_tokens: int = 2048,
    on_progress: Callable[[int, int], Any] | None = None,
) -> PerplexityResult:
    """Measure how well a model predicts text (see above for the conventions).

    Args:
        model: a transformers causal language model, or a PeftModel around one; meanwhile it is in eval mode and its
            attention exact.
        token_ids: integer ``[N]``, one document, or several of them; a window never spans two. Begin-of-text tokens,
            where the model wants them, are the caller's.
        window: tokens read at once; may exceed what the model was made for.
        stride: tokens from one window's start to the next's.
        convention: ``"document"`` or ``"longlora"``.
        bucket_tokens: positions per bucket.
        on_progress: called with windows done and windows in all.
    Raises: ConfigError: settings that do not go together. DataError: nothing to score, or tokens that the model
            does not know.
    """
    _check(window, stride, convention, bucket_tokens)
    documents = [token_ids] if isinstance(token_ids, Tensor) else list(token_ids)
    plan = [
        found for number, ids in enumerate(documents) for found in _windows(number, ids, window, stride, convention)
    ]
    if not plan:
        longest = max((len(ids) for ids in documents), default=0)
        needed = window if convention == "longlora" else 2
        raise DataError(
            f"nothing to score: {len(documents)} documents, the longest of {longest:,} tokens; at least {needed:,} are"
            " needed in one; give more text or a smaller window"
        )
    totals = torch.zeros(-(-window // bucket_tokens), dtype=torch.float64)
    counts = torch.zeros(len(totals), dtype=torch.int64)
    by_window = []
    with measured(model, swept=True):
        for done, part in enumerate(plan, start=1):
            losses = _score(model, documents[part.document][part.start : part.stop], part.first_scored - part.start)
            losses = losses.double().cpu()
            by_window.append(float(losses.mean()))
            bucket = torch.arange(part.first_scored - part.start, part.stop - part.start) // bucket_tokens
            totals.index_add_(0, bucket, losses)
            counts += bucket.bincount(minlength=len(counts))
            if on_progress is not None:
                on_progress(done, len(plan))
    nll = float(totals.sum() / counts.sum())
    buckets = [
        _bucket(number * bucket_tokens, min((number + 1) * bucket_tokens, window), int(count), float(total))
        for number, (total, count) in enumerate(zip(totals, counts, strict=True))
        if count
    ]
    return PerplexityResult(
        perplexity=_exp(nll),
        nll=nll,
        num_tokens=int(counts.sum()),
        num_windows=len(plan),
        num_documents=len({part.document for part in plan}),
        unread_tokens=_unread(documents, plan),
        convention=convention,
        window=window,
        stride=stride,
        by_position=tuple(buckets),
        by_window=tuple(by_window),
    )


def _windows(number: int, ids: Tensor, window: int, stride: int, convention: str) -> Iterator[ScoredWindow]:
    if ids.dim() != 1:
        raise DataError(f"token_ids: document {number} has shape {list(ids.shape)}; give one dimension per document")
    if convention == "longlora":
        for start in range(0, len(ids) - window + 1, stride):
            yield ScoredWindow(number, start, start + window, start + 1)
        return
    scored = 0
    for start in range(0, len(ids), stride):
        stop = min(start + window, len(ids))
        first = max(scored, start + 1)  # a window's first token has nothing to be predicted from
        if first < stop:
            yield ScoredWindow(number, start, stop, first)
        scored = stop
        if stop == len(ids):
            return


def _unread(documents: Sequence[Tensor], plan: Sequence[ScoredWindow]) -> int:
    """Tokens that no window covers; windows of a document overlap or touch, unless the stride exceeds the window."""
    read = 0
    for part, following in zip(plan, [*plan[1:], None], strict=True):
        same = following is not None and following.document == part.document
        read += (min(part.stop, following.start) if same and following is not None else part.stop) - part.start
    return sum(len(ids) for ids in documents) - read


def _score(model: nn.Module, ids: Tensor, first: int) -> Tensor:
    """Negative log-likelihood of the tokens ``[first, len(ids))``."""
    nature = nature_of(model)
    nature.require_head()
    head = output_head(model)
    require_known(ids, head.weight.shape[0])
    ids = ids.to(head.weight.device)
    inputs = {"input_ids": ids[None], "use_cache": False}
    hidden, norm = hidden_states(model, defer_norm=nature.ends_in_norm, **inputs)  # [1, T, D]
    return token_losses(hidden[0, first - 1 : -1], head, ids[first:].long(), norm=norm)


def _bucket(start: int, stop: int, count: int, total: float) -> Bucket:
    return Bucket(start, stop, count, total / count, _exp(total / count))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf  # a broken model may overflow even float64


def _check(window: int, stride: int, convention: str, bucket_tokens: int) -> None:
    if convention not in CONVENTIONS:
        raise ConfigError(f"convention {convention!r}: unknown; allowed are {', '.join(CONVENTIONS)}")
    if window < 2:
        raise ConfigError(f"window {window}: must be at least 2 tokens, one to read and one to predict")
    if stride < 1 or (convention == "document" and stride > window):
        raise ConfigError(
            f"stride {stride}: must be from 1 to the window, {window}, or tokens between would be skipped"
        )
    if bucket_tokens < 1:
        raise ConfigError(f"bucket_tokens {bucket_tokens}: must be at least 1")
