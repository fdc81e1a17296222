"""How far one model has drifted from another: what both say about every token of the same text.

    KL             mean of KL(reference || model) over the tokens, in nats: 0 is the same distribution everywhere
    perplexity     of the text, for the model and for the reference
    same greedy    share of the positions at which both find the same token likeliest

The two models need not be in memory together: of the reference its last hidden states stay, a vector a token, and its
output matrix. Logits exist for a few tokens at a time and are made in float32 from whatever the models compute in:
logits in bfloat16 are rounded by more than what a careful merge changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longfit.engine.hf_model import OutputHead, hidden_states, output_head
from longfit.errors import DataError
from longfit.evaluation.evaluation_mode import measured, require_known

LOGITS_BYTES = 128 << 20  # of one tile of float32 logits; two of them are held
HEAD_BYTES = 64 << 20  # of the slice of an output matrix that is turned into float32 at a time


@dataclass(frozen=True)
class Drift:
    """A model beside a reference.

    Attributes:
        name: of the model.
        kl: mean KL divergence a token from the reference, nats.
        perplexity: of the text.
        same_greedy: share of positions with the same likeliest token, 0 to 1.
        num_tokens: positions compared.
    """

    name: str
    kl: float
    perplexity: float
    same_greedy: float
    num_tokens: int


@dataclass(frozen=True)
class Reference:
    """What a model says about some windows of text: its last hidden states, each ``[T, D]``, and its output matrix."""

    windows: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]
    head: OutputHead


@torch.no_grad()
def read_reference(model: nn.Module, windows: Sequence[Tensor]) -> Reference:
    """Read windows (int64 ``[T]``) with a model and keep what it says.

    Raises: DataError: no window has two tokens, or one holds a token that the model does not know.
    """
    windows = tuple(window for window in windows if len(window) > 1)
    if not windows:
        raise DataError("nothing to compare two models on: a text of at least two tokens is needed")
    head = output_head(model)
    for window in windows:
        require_known(window, head.weight.shape[0])
    hidden = tuple(_last_hidden(model, window) for window in windows)
    bias = None if head.bias is None else head.bias.detach().clone()
    return Reference(windows, hidden, OutputHead(head.weight.detach(), bias, head.softcap, head.scale))


@torch.no_grad()
def drift_between(name: str, found: Reference, reference: Reference) -> Drift:
    """Compare what two models said about the same windows.

    Raises: DataError: the two have vocabularies of different sizes.
    """
    rows, expected_rows = found.head.weight.shape[0], reference.head.weight.shape[0]
    if rows != expected_rows:
        raise DataError(
            f"{name}: {rows:,} tokens in its vocabulary, {expected_rows:,} in that of the reference; the two cannot be"
            " compared"
        )
    kl = nll = same = count = 0.0
    for window, ours, theirs in zip(reference.windows, found.hidden, reference.hidden, strict=True):
        targets = window[1:].to(ours.device)
        for part in _token_tiles(len(targets), rows):
            p = logits(theirs[part], reference.head).log_softmax(-1)
            q = logits(ours[part], found.head).log_softmax(-1)
            same += float((p.argmax(-1) == q.argmax(-1)).sum())
            nll -= float(q.gather(1, targets[part, None]).double().sum())
            kl += float(p.exp().mul_(p - q).sum(-1).double().sum())
            count += len(q)
    return Drift(name, max(0.0, kl / count), _exp(nll / count), same / count, int(count))


@torch.no_grad()
def logit_spread(reference: Reference) -> float:
    """Root of the mean square of a reference's logits about the mean of each token's."""
    total = count = 0.0
    for hidden in reference.hidden:
        for part in _token_tiles(len(hidden), reference.head.weight.shape[0]):
            made = logits(hidden[part], reference.head)
            total += float(made.var(-1, correction=0).double().sum())
            count += len(made)
    return math.sqrt(total / count)


def logits(hidden: Tensor, head: OutputHead) -> Tensor:
    """float32 logits ``[T, V]`` of hidden states ``[T, D]`` after the last norm."""
    weight = head.weight
    made = torch.empty(len(hidden), len(weight), dtype=torch.float32, device=weight.device)
    step = max(1, HEAD_BYTES // (4 * weight.shape[1]))
    hidden = hidden.to(weight.device, torch.float32)
    for start in range(0, len(weight), step):
        torch.mm(hidden, weight[start : start + step].float().t(), out=made[:, start : start + step])
    if head.bias is not None:
        made += head.bias.float()
    if head.scale != 1.0:
        made *= head.scale
    if head.softcap is not None:
        made.div_(head.softcap).tanh_().mul_(head.softcap)
    return made


def _last_hidden(model: nn.Module, window: Tensor) -> Tensor:
    """Hidden states ``[T, D]`` after the last norm, in the model's dtype."""
    device = output_head(model).weight.device
    with measured(model, swept=True):
        hidden, norm = hidden_states(model, input_ids=window[None].to(device), use_cache=False)
        return hidden[0] if norm is None else norm(hidden)[0]


def _token_tiles(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    step = max(1, LOGITS_BYTES // (4 * vocab_size))
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
