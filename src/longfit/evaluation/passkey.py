"""Passkey retrieval: is a number that stands somewhere in a long text found again? (LongLoRA, section 4.2)

    There is an important info hidden inside a lot of irrelevant text. [...]
    hay  The pass key is 48213. Remember it. 48213 is the pass key.  hay
    What is the pass key? The pass key is

The task is Mohtashami and Jaggi's (arXiv 2305.16300). Every cell of a grid, length by depth, gets several trials, each
with a number of its own, and an interval: 5 of 5 is not 100 %, but 57 % to 100 % (Wilson, 95 %).

A trial is won if the first whole number in the greedy continuation is the pass key. Digits are compared, not tokens,
because one number has several spellings in tokens. Beside it stands the log-probability of the key, which moves long
before the first trial is won. Chance wins 1 in 90,000 trials.

Hay is the filler of the papers, which a model soon ignores, or the user's own documents, which are harder. This shows
that a position *can* be read; it does not show that a model reasons over a long text.

Prompts of a grid share their hay from the beginning. They are read deepest needle first, so that each reuses the keys
and values up to its needle: the result is that of reading each alone, in less than half the time.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from longfit.errors import ConfigError, DataError
from longfit.evaluation.reader import Reader, shared_prefix

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about"
    " the important information there.\n\n"
)
FILLER = ("The grass is green. ", "The sky is blue. ", "The sun is yellow. ", "Here we go. ", "There and back again. ")
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\n\nWhat is the pass key? The pass key is"
ANSWER = " {key}"
LOW, HIGH = 10_000, 99_999  # five digits, all numbers equally long
EXTRA_TOKENS = 8  # beyond the key's own, for an answer that begins with words
LONGEST_UNIT = 400  # characters of hay that are never cut; a longer line is cut where sentences or words end


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
        hay: ``"filler"`` or ``"documents"``.
        confidence: of the intervals.
        seed: decides the keys, cell by cell, whatever else is in the grid.
    """

    accuracy: float
    low: float
    high: float
    cells: tuple[Cell, ...]
    trials: tuple[Trial, ...]
    hay: str
    confidence: float
    seed: int


def passkey(
    model: nn.Module,
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 5,
    documents: Sequence[str] | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    on_progress: Callable[[int, int], Any] | None = None,
) -> PasskeyResult:
    """Measure passkey retrieval over a grid of lengths and depths (LongLoRA, section 4.2).

    Args:
        model: a transformers causal language model, or a PeftModel around one; attention is exact meanwhile.
        tokenizer: its own.
        lengths: tokens of a prompt; each is filled as far as whole sentences or lines go. May exceed the context.
        depths: where the needle lies in the hay, from 0 (begin) to 1 (end).
        trials: per cell, each with another key.
        documents: text to use as hay, in order; None is the papers' filler.
        seed: decides the keys.
        confidence: of the intervals.
        on_progress: called with trials done and trials in all.
    Raises: ConfigError: an empty or impossible grid. DataError: too little hay, hay that speaks of a pass key itself,
            or a tokenizer that is not the model's.
    """
    _check(lengths, depths, trials, confidence)
    hay = Hay.filler(max(lengths)) if documents is None else Hay.of(documents)
    prompts = [
        prompt
        for length in sorted(set(lengths))
        for prompt in _prompts(tokenizer, hay, length, sorted({float(depth) for depth in depths}), trials, seed)
    ]
    order = sorted(range(len(prompts)), key=lambda index: prompts[index].needle_at, reverse=True)
    reader, found = Reader(model), {}
    for done, index in enumerate(order, start=1):
        found[index] = run_trial(reader, tokenizer, prompts[index])
        if on_progress is not None:
            on_progress(done, len(prompts))
    results = tuple(found[index] for index in range(len(prompts)))
    cells = tuple(_cell(results[first : first + trials], confidence) for first in range(0, len(results), trials))
    correct = sum(result.correct for result in results)
    low, high = wilson(correct, len(results), confidence=confidence)
    kind = "filler" if documents is None else "documents"
    return PasskeyResult(correct / len(results), low, high, cells, results, kind, confidence, seed)


@dataclass(frozen=True)
class Prompt:
    """One question about one key: its text, and the same with the answer, as tokens."""

    length: int
    depth: float
    key: str
    token_ids: Tensor  # [N]
    with_answer: Tensor
    needle_at: int  # characters of hay before the needle


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


def decode(tokenizer: Any, token_ids: list[int]) -> str:
    """Tokens as text, special tokens left out and spaces left as they are."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def encode(tokenizer: Any, text: str) -> Tensor:
    """Text as tokens ``[N]``, with what the tokenizer puts before a text but not with an end token."""
    ids = tokenizer(text, verbose=False).input_ids
    return torch.tensor(ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids, dtype=torch.int64)


# ------------------------------------------------------------------------------------------------ prompts
@dataclass(frozen=True)
class Hay:
    """Text in pieces between which a needle may lie; each ends in white space."""

    units: tuple[str, ...]
    separator: str  # after the needle, as after every piece

    @classmethod
    def filler(cls, num_tokens: int) -> "Hay":
        """The filler of the papers; a sentence has more than one token, so there is enough."""
        return cls(tuple(islice(cycle(FILLER), num_tokens)), " ")

    @classmethod
    def of(cls, documents: Sequence[str]) -> "Hay":
        """Documents one after the other, line by line; long lines sentence by sentence.

        Raises: DataError: no text in them, or they speak of a pass key themselves.
        """
        units = tuple(
            unit for document in documents for line in document.splitlines() for unit in _pieces(line.rstrip() + "\n")
        )
        telling = next((unit for unit in units if "pass key is" in unit.lower()), None)
        if telling is not None:
            raise DataError(f"the hay itself says {telling.strip()[:80]!r}: no answer could be judged; use other text")
        if not any(unit.strip() for unit in units):
            raise DataError(f"{len(documents)} documents without text: nothing to hide a pass key in; give some text")
        return cls(units, "\n")


def _pieces(line: str) -> list[str]:
    """Cut a line that is too long after sentences, and what is still too long after words."""
    pieces = [line]
    for after in (r"(?<=[.!?])\s+", r"\s+"):
        pieces = [
            part
            for piece in pieces
            for part in ([piece] if len(piece) <= LONGEST_UNIT else re.findall(rf".+?{after}|.+$", piece, re.DOTALL))
        ]
    return pieces


def _prompts(tokenizer: Any, hay: Hay, length: int, depths: Sequence[float], trials: int, seed: int) -> list[Prompt]:
    most = _most_units(tokenizer, hay, length)
    prompts = []
    for depth in depths:
        draw = random.Random(f"{seed} {length} {depth}")
        keys: list[str] = []
        while len(keys) < trials:
            key = str(draw.randint(LOW, HIGH))
            if key not in keys and not any(key in unit for unit in hay.units[:most]):
                keys.append(key)
        prompts += [_prompt(tokenizer, hay, most, length, depth, key) for key in keys]
    return prompts


def _most_units(tokenizer: Any, hay: Hay, length: int) -> int:
    """The largest number of pieces with which a prompt still fits; found by doubling, then halving."""

    def tokens(num_units: int) -> int:
        return len(encode(tokenizer, _text(hay, num_units, num_units, str(HIGH))[0]))

    smallest = tokens(1)
    if smallest > length:
        raise ConfigError(f"length {length}: the shortest prompt has {smallest} tokens; give at least that")
    fits, step = 1, 1
    while fits + step <= len(hay.units) and tokens(fits + step) <= length:
        fits, step = fits + step, step * 2
    while step > 1:
        step //= 2
        if fits + step <= len(hay.units) and tokens(fits + step) <= length:
            fits += step
    if fits == len(hay.units):
        raise DataError(
            f"length {length:,}: all the hay makes a prompt of {tokens(fits):,} tokens; give more documents, or shorter"
            " lengths"
        )
    return fits


def _prompt(tokenizer: Any, hay: Hay, most: int, length: int, depth: float, key: str) -> Prompt:
    """The prompt of one trial; another key may have more tokens than the one that was measured with."""
    for num_units in range(most, 0, -1):
        place = _place(hay, num_units, depth)
        text, needle_at = _text(hay, num_units, place, key)
        token_ids = encode(tokenizer, text)
        if len(token_ids) <= length:
            with_answer = encode(tokenizer, text + ANSWER.format(key=key))
            return Prompt(length, depth, key, token_ids, with_answer, needle_at)
    raise ConfigError(f"length {length}: no prompt with key {key} is that short; give a larger length")


def _place(hay: Hay, num_units: int, depth: float) -> int:
    """The number of pieces before the boundary nearest to a depth."""
    sizes = [len(unit) for unit in hay.units[:num_units]]
    target, end = depth * sum(sizes), 0.0
    for index, size in enumerate(sizes):
        if end + size / 2 > target:
            return index
        end += size
    return num_units


def _text(hay: Hay, num_units: int, place: int, key: str) -> tuple[str, int]:
    """A prompt with the needle after ``place`` pieces of hay, and the characters of hay before it."""
    before, after = "".join(hay.units[:place]), "".join(hay.units[place:num_units])
    return f"{INTRODUCTION}{before}{NEEDLE.format(key=key)}{hay.separator}{after.rstrip()}{QUESTION}", len(before)


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


def _check(lengths: Sequence[int], depths: Sequence[float], trials: int, confidence: float) -> None:
    if not lengths or not depths:
        raise ConfigError("an empty grid: give at least one length and one depth")
    if min(lengths) < 1:
        raise ConfigError(f"length {min(lengths)}: must be a number of tokens")
    wrong = [depth for depth in depths if not 0 <= depth <= 1]
    if wrong:
        raise ConfigError(f"depth {wrong[0]}: must lie between 0 (begin of the hay) and 1 (its end)")
    if trials < 1:
        raise ConfigError(f"trials {trials}: must be at least 1 in a cell")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence {confidence}: must lie between 0 and 1; try 0.95")
