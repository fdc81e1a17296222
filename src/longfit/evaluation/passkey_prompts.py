"""Long texts with pass keys hidden in them, and the questions that ask for one (see ``passkey.py``).

    There is an important info hidden inside a lot of irrelevant text. [...]
    haystack  The pass key is 48213. Remember it. 48213 is the pass key.  haystack
    What is the pass key? The pass key is

The haystack comes in pieces, whole sentences or lines, and needles lie between them, so that every prompt is text a
tokenizer might meet: it is made as text and then made tokens, never put together from tokens. Several keys can be
hidden together, each named after a thing ("The pass key of the lantern is ..."); then one reading of the text serves
them all.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from torch import Tensor

from longfit.errors import ConfigError, DataError
from longfit.evaluation.tokens import encode

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about"
    " the important information there.\n\n"
)
FILLER = ("The grass is green. ", "The sky is blue. ", "The sun is yellow. ", "Here we go. ", "There and back again. ")
NEEDLE = "The {what} is {key}. Remember it. {key} is the {what}."
QUESTION = "\n\nWhat is the {what}? The {what} is"
ANSWER = " {key}"
THINGS = (
    "lantern", "harbor", "violin", "garden", "mirror", "bridge", "candle", "forest", "window", "basket", "hammer",
    "island", "pencil", "rocket", "saddle", "temple", "wagon", "anchor", "button", "castle", "desert", "engine",
)  # fmt: skip
LOW, HIGH = 10_000, 99_999  # five digits, all numbers equally long
LONGEST_UNIT = 400  # characters of the haystack that are never cut; a longer line is cut where sentences or words end


@dataclass(frozen=True)
class Haystack:
    """Text in pieces between which a needle may lie; each ends in white space."""

    units: tuple[str, ...]
    separator: str  # after the needle, as after every piece

    @classmethod
    def filler(cls, num_tokens: int) -> "Haystack":
        """The filler of the papers; a sentence has more than one token, so there is enough."""
        return cls(tuple(islice(cycle(FILLER), num_tokens)), " ")

    @classmethod
    def of(cls, documents: Sequence[str]) -> "Haystack":
        """Documents one after the other, line by line; long lines sentence by sentence.

        Raises: DataError: no text in them, or they speak of a pass key themselves.
        """
        units = tuple(
            unit for document in documents for line in document.splitlines() for unit in _pieces(line.rstrip() + "\n")
        )
        telling = next((unit for unit in units if "pass key" in unit.lower()), None)
        if telling is not None:
            raise DataError(
                f"the haystack itself says {telling.strip()[:80]!r}: no answer could be judged; use other text"
            )
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


@dataclass(frozen=True)
class Prompt:
    """One question about one key: its text, and the same with the answer, as tokens.

    Attributes:
        length, depth, trial: its place in the grid.
        key: what is asked for.
        token_ids, with_answer: ``[N]`` and a little more.
        shared: characters of the haystack that prompts of other trials begin with too.
    """

    length: int
    depth: float
    trial: int
    key: str
    token_ids: Tensor
    with_answer: Tensor
    shared: int


@dataclass(frozen=True)
class Needle:
    """A key, what it is the key of (None for just "pass key"), and its depth in the haystack."""

    key: str
    thing: str | None
    depth: float

    def put_into(self, sentence: str) -> str:
        """Fill ``NEEDLE`` or ``QUESTION``."""
        what = "pass key" if self.thing is None else f"pass key of the {self.thing}"
        return sentence.format(what=what, key=self.key)


def make_prompts(
    tokenizer: Any,
    haystack: Haystack,
    length: int,
    *,
    depths: Sequence[float],
    trials: Sequence[int],
    together: bool,
    seed: int,
) -> list[Prompt]:
    """The prompts of one length, by depth and then trial.

    Args:
        tokenizer: the model's.
        haystack: what to hide keys in.
        length: tokens of a prompt at most.
        depths: ascending.
        trials: of each depth, the same of all if ``together``; every one has a key of its own.
        together: hide the keys of all depths in one text, one text a trial.
        seed: decides the keys.
    Raises: ConfigError: ``length`` is too short. DataError: too short a haystack.
    """
    things = [None] if not together else [THINGS[index] for index in range(len(depths))]
    probe = [Needle(str(HIGH), thing, 1.0) for thing in things]
    most = _most_units(tokenizer, haystack, length, probe)
    prompts: dict[tuple[float, int], Prompt] = {}
    keys = {
        depth: _keys(haystack.units[:most], f"{seed} {length} {depth}", count)
        for depth, count in zip(depths, trials, strict=True)
    }
    for trial in range(max(trials)):
        if together:
            names = random.Random(f"{seed} {length} {trial}").sample(THINGS, len(depths))
            needles = [Needle(keys[d][trial], name, d) for d, name in zip(depths, names, strict=True)]
        for index, depth in enumerate(depths):
            if trial >= trials[index]:
                continue
            hidden = needles if together else [Needle(keys[depth][trial], None, depth)]
            prompts[depth, trial] = _prompt(tokenizer, haystack, most, length, trial, hidden, hidden[index * together])
    return [prompts[depth, trial] for depth, count in zip(depths, trials, strict=True) for trial in range(count)]


def shortest_prompt(tokenizer: Any) -> int:
    """Tokens of a prompt with one key and one sentence of the haystack, about: keys differ in tokens."""
    needle = Needle(str(HIGH), None, 1.0)
    return len(encode(tokenizer, _text(Haystack.filler(1), 1, [needle], needle)[0]))


def _keys(units: Sequence[str], seed: str, count: int) -> list[str]:
    """Different numbers that do not occur in the haystack."""
    draw = random.Random(seed)
    keys: list[str] = []
    while len(keys) < count:
        key = str(draw.randint(LOW, HIGH))
        if key not in keys and not any(key in unit for unit in units):
            keys.append(key)
    return keys


def _most_units(tokenizer: Any, haystack: Haystack, length: int, needles: Sequence[Needle]) -> int:
    """The largest number of pieces with which a prompt still fits; found by doubling, then halving."""

    def tokens(num_units: int) -> int:
        return len(encode(tokenizer, _text(haystack, num_units, needles, needles[0])[0]))

    smallest = tokens(1)
    if smallest > length:
        raise ConfigError(f"length {length}: the shortest prompt has {smallest} tokens; give at least that")
    fits, step = 1, 1
    while fits + step <= len(haystack.units) and tokens(fits + step) <= length:
        fits, step = fits + step, step * 2
    while step > 1:
        step //= 2
        if fits + step <= len(haystack.units) and tokens(fits + step) <= length:
            fits += step
    if fits == len(haystack.units):
        raise DataError(
            f"length {length:,}: the whole haystack makes a prompt of {tokens(fits):,} tokens; give more documents, or"
            " shorter lengths"
        )
    return fits


def _prompt(
    tokenizer: Any, haystack: Haystack, most: int, length: int, trial: int, needles: Sequence[Needle], asked: Needle
) -> Prompt:
    """One prompt; its keys and things may have more tokens than those that the haystack was measured with."""
    for num_units in range(most, 0, -1):
        text, shared = _text(haystack, num_units, needles, asked)
        token_ids = encode(tokenizer, text)
        if len(token_ids) <= length:
            with_answer = encode(tokenizer, text + ANSWER.format(key=asked.key))
            return Prompt(length, asked.depth, trial, asked.key, token_ids, with_answer, shared)
    raise ConfigError(f"length {length}: no prompt with key {asked.key} is that short; give a larger length")


def _text(haystack: Haystack, num_units: int, needles: Sequence[Needle], asked: Needle) -> tuple[str, int]:
    """The haystack with needles, depths ascending, and a question; its characters before the first needle."""
    places = [_place(haystack, num_units, needle.depth) for needle in needles]
    parts, done = [INTRODUCTION], 0
    for place, needle in zip(places, needles, strict=True):
        parts += ["".join(haystack.units[done:place]), needle.put_into(NEEDLE), haystack.separator]
        done = place
    rest = "".join(haystack.units[done:num_units]).rstrip()
    return "".join([*parts, rest, asked.put_into(QUESTION)]), len(parts[1])


def _place(haystack: Haystack, num_units: int, depth: float) -> int:
    """The number of pieces before the boundary nearest to a depth."""
    sizes = [len(unit) for unit in haystack.units[:num_units]]
    target, end = depth * sum(sizes), 0.0
    for index, size in enumerate(sizes):
        if end + size / 2 > target:
            return index
        end += size
    return num_units
