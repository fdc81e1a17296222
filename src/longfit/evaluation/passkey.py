"""Passkey retrieval: is a number that stands somewhere in a long text found again? (LongLoRA, section 4.2)

The task is Mohtashami and Jaggi's (arXiv 2305.16300). Every cell of a grid, length by depth, gets several trials, each
with a number of its own, and an interval: 5 of 5 is not 100 %, but 57 % to 100 % (Wilson, 95 %).

A trial is won if the first whole number in the greedy continuation is the pass key. Digits are compared, not tokens,
because one number has several spellings in tokens. Beside it stands the log-probability of the key, which moves long
before the first trial is won. Chance wins 1 in 90,000 trials.

    papers' task      one key in a text; a trial reads the text anew from its key on
    ``together``      the keys of all depths in one text, each the key of a thing; the text is read once for all of
                      them. Many trials for one reading, but another task: the right key must be told from others
                      (RULER, arXiv 2404.06654, calls it multi-key). SmolLM2-135M, which finds every single key in
                      512 tokens, finds 4 of 18 among nine in 600 to 1,024. For larger models.

The haystack is the filler of the papers, which a model soon ignores, or the user's own documents, which are harder.
This shows that a position *can* be read; it does not show that a model reasons over a long text.

Prompts are read in an order in which each reuses the keys and values of what it shares with the one before; the result
is that of reading each alone. How prompts are made is ``passkey_prompts.py``.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import NormalDist
from typing import Any

import torch
from torch import nn

from longfit.errors import ConfigError
from longfit.evaluation.passkey_prompts import THINGS, Haystack, Prompt, make_prompts
from longfit.evaluation.reader import Reader, shared_prefix
from longfit.evaluation.tokens import decode

EXTRA_TOKENS = 8  # beyond the key's own, for an answer that begins with words


@dataclass(frozen=True)
class Trial:
    """One prompt and what became of it.

    Attributes:
        length, depth: of the cell.
        num_tokens: of the prompt, at most ``length``.
        key: the number hidden.
        answer: the greedy continuation, up to where its first number was complete.
        correct: whether that number is the key.
        key_nll: minus the log-probability of the key, in nats, all its tokens together.
    """

    length: int
    depth: float
    num_tokens: int
    key: str
    answer: str
    correct: bool
    key_nll: float


@dataclass(frozen=True)
class Cell:
    """All trials of one length and depth: the share won with its Wilson interval, and the key's mean loss in nats."""

    length: int
    depth: float
    num_trials: int
    num_correct: int
    accuracy: float
    low: float
    high: float
    key_nll: float


@dataclass(frozen=True)
class PasskeyResult:
    """A grid of retrieval trials.

    Attributes:
        accuracy, low, high: over all trials, with the Wilson interval.
        cells: by length, then depth.
        trials: in the same order.
        haystack: ``"filler"`` or ``"documents"``.
        together: whether the keys of all depths were in one text.
        confidence: of the intervals.
        seed: decides the keys, cell by cell, whatever else is in the grid.
    """

    accuracy: float
    low: float
    high: float
    cells: tuple[Cell, ...]
    trials: tuple[Trial, ...]
    haystack: str
    together: bool
    confidence: float
    seed: int


def passkey(
    model: nn.Module,
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int | Sequence[int] = 5,
    documents: Sequence[str] | None = None,
    together: bool = False,
    seed: int = 0,
    confidence: float = 0.95,
    on_progress: Callable[[int, int], Any] | None = None,
) -> PasskeyResult:
    """Measure passkey retrieval over a grid of lengths and depths (LongLoRA, section 4.2).

    Args:
        model: a transformers causal language model, or a PeftModel around one; attention is exact meanwhile.
        tokenizer: its own.
        lengths: tokens of a prompt; each is filled as far as whole sentences or lines go. May exceed the context.
        depths: where the needle lies in the haystack, from 0 (begin) to 1 (end).
        trials: per cell, each with another key; or a number for each depth, from the begin to the end.
        documents: text of the haystack, in order; None is the papers' filler.
        together: hide the keys of all depths in one text and read it once; see above.
        seed: decides the keys.
        confidence: of the intervals.
        on_progress: called with trials done and trials in all.
    Raises: ConfigError: an empty or impossible grid. DataError: too short a haystack, one that speaks of a pass key
            itself, or a tokenizer that is not the model's.
    """
    depths = sorted({float(depth) for depth in depths})
    counts = [trials] * len(depths) if isinstance(trials, int) else list(trials)
    _check(lengths, depths, counts, confidence)
    if together and len(set(counts)) > 1:
        raise ConfigError(f"trials {counts}: together, every text asks for the keys of all depths; give one number")
    if together and len(depths) > len(THINGS):
        raise ConfigError(f"{len(depths)} depths: together, at most {len(THINGS)} keys can be told apart; give fewer")
    haystack = Haystack.filler(max(lengths)) if documents is None else Haystack.of(documents)
    prompts = [
        prompt
        for length in sorted(set(lengths))
        for prompt in make_prompts(
            tokenizer, haystack, length, depths=depths, trials=counts, together=together, seed=seed
        )
    ]

    def rank(index: int) -> tuple[int, int, int]:  # what shares most is read together, what shares least last
        return prompts[index].shared, prompts[index].length, prompts[index].trial

    order = sorted(range(len(prompts)), key=rank, reverse=True)
    reader, found = Reader(model), {}
    for done, index in enumerate(order, start=1):
        found[index] = run_trial(reader, tokenizer, prompts[index])
        if on_progress is not None:
            on_progress(done, len(prompts))
    results = tuple(found[index] for index in range(len(prompts)))
    ends = list(accumulate(counts * (len(results) // sum(counts)), initial=0))
    cells = tuple(_cell(results[first:end], confidence) for first, end in pairwise(ends))
    correct = sum(result.correct for result in results)
    low, high = wilson(correct, len(results), confidence=confidence)
    kind = "filler" if documents is None else "documents"
    return PasskeyResult(correct / len(results), low, high, cells, results, kind, together, confidence, seed)


def run_trial(reader: Reader, tokenizer: Any, prompt: Prompt) -> Trial:
    """Read a prompt, let the model continue greedily, and compare digits."""
    shared = shared_prefix(prompt.token_ids, prompt.with_answer)
    expected = prompt.with_answer[shared:]
    logits = reader.read(prompt.with_answer, keep=len(expected) + 1)  # [answer + 1, V], one pass for both measures
    taken = logits[:-1].log_softmax(-1).gather(1, expected.to(logits.device)[:, None])
    draft = expected.tolist() if shared == len(prompt.token_ids) else []
    answer = _answer(reader, tokenizer, prompt, logits.argmax(-1).tolist() if draft else [], draft)
    won = first_number(answer) == prompt.key
    return Trial(prompt.length, prompt.depth, len(prompt.token_ids), prompt.key, answer, won, -float(taken.sum()))


def _answer(reader: Reader, tokenizer: Any, prompt: Prompt, checked: list[int], draft: list[int]) -> str:
    """Continue greedily until the first number is complete; ``checked`` is what follows the draft, token by token."""
    made: list[int] = []
    limit = len(prompt.with_answer) - len(prompt.token_ids) + EXTRA_TOKENS
    while True:
        agrees = made == draft[: len(made)]
        if agrees and len(made) < len(checked):
            token = checked[len(made)]
        else:
            token = int(reader.read(torch.cat([prompt.token_ids, torch.tensor(made, dtype=torch.int64)])).argmax())
        made.append(token)
        text = decode(tokenizer, made)
        if token == tokenizer.eos_token_id or len(made) >= limit or _is_decided(text, prompt.key):
            return text


def _is_decided(text: str, key: str) -> bool:
    """Whether more text cannot change if the first number in it is the key."""
    number = re.search(r"\d+", text)
    return number is not None and (number.end() < len(text) or not key.startswith(number[0]))


def first_number(text: str) -> str | None:
    """The first run of digits in a text."""
    number = re.search(r"\d+", text)
    return None if number is None else number[0]


# ------------------------------------------------------------------------------------------------ statistics
def wilson(num_correct: int, num_trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a share that was observed in a few trials (Wilson, 1927); it is honest at 0 and at all.

    Args:
        num_correct, num_trials: observed; at least one trial.
        confidence: between 0 and 1.
    Returns: low and high, within [0, 1].
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = num_correct / num_trials
    centre = share + z * z / (2 * num_trials)
    spread = z * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    scale = 1 + z * z / num_trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _cell(trials: Sequence[Trial], confidence: float) -> Cell:
    correct = sum(trial.correct for trial in trials)
    low, high = wilson(correct, len(trials), confidence=confidence)
    nll = sum(trial.key_nll for trial in trials) / len(trials)
    return Cell(trials[0].length, trials[0].depth, len(trials), correct, correct / len(trials), low, high, nll)


def _check(lengths: Sequence[int], depths: Sequence[float], trials: Sequence[int], confidence: float) -> None:
    if not lengths or not depths:
        raise ConfigError("an empty grid: give at least one length and one depth")
    if min(lengths) < 1:
        raise ConfigError(f"length {min(lengths)}: must be a number of tokens")
    wrong = [depth for depth in depths if not 0 <= depth <= 1]
    if wrong:
        raise ConfigError(f"depth {wrong[0]}: must lie between 0 (begin of the haystack) and 1 (its end)")
    if len(trials) != len(depths):
        raise ConfigError(f"trials {list(trials)}: {len(trials)} numbers for {len(depths)} depths; give one for each")
    if min(trials) < 1:
        raise ConfigError(f"trials {min(trials)}: must be at least 1 in a cell")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence {confidence}: must lie between 0 and 1; try 0.95")
