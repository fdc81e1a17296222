"""Multi-query associative recall: answers lie far back and cannot be guessed (Arora et al., 2023, Zoology).

    <s> filler key value filler filler key value ... <?> key value key value ...
                   '---- pairs at random depths ----'    '--- questions, in another order ---'

Keys and values are drawn anew for each sequence, so nothing but the sequence holds the answer; chance is one in the
number of values. Only the values behind the questions are trained on and asked for. A needle is corrupted by putting
another value behind its key: a model that answers as before has not read it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BOS, QUESTIONS, FIRST_FREE = 0, 1, 2
IGNORED = -100


@dataclass(frozen=True)
class Task:
    """The vocabulary and the number of questions.

    Attributes:
        pairs: in a sequence; each is asked for once.
        keys, values, fillers: tokens of each kind.
    """

    pairs: int = 16
    keys: int = 64
    values: int = 64
    fillers: int = 64

    @property
    def vocab_size(self) -> int:
        """Tokens of all kinds, with those that begin a sequence and its questions."""
        return FIRST_FREE + self.keys + self.values + self.fillers

    @property
    def chance(self) -> float:
        """Share of answers that guessing gets right."""
        return 1 / self.values


@dataclass(frozen=True)
class Sequences:
    """A batch of the task.

    Attributes:
        ids: int64 ``[B, T]``.
        labels: int64 ``[B, T]``: the values behind the questions, else -100.
        answers: int64 ``[B, pairs]``: index of each asked value.
        needles: int64 ``[B, pairs]``: index of the value that answers it, in the order of the questions.
    """

    ids: Tensor
    labels: Tensor
    answers: Tensor
    needles: Tensor

    @property
    def distance(self) -> Tensor:
        """Tokens from a needle to its question ``[B, pairs]``."""
        return self.answers - self.needles

    @property
    def depth(self) -> Tensor:
        """Where a needle lies, from 0 at the beginning to 1 where the questions begin ``[B, pairs]``."""
        return self.needles / self.answers[:, :1]


def draw(task: Task, *, batch: int, length: int, generator: torch.Generator) -> Sequences:
    """Draw sequences of ``length`` tokens.

    Raises: ValueError: the pairs and their questions do not fit.
    """
    body = length - 2 - 2 * task.pairs  # filler and pairs, between <s> and <?>
    slots = body // 2
    if slots < task.pairs:
        raise ValueError(f"length {length}: {task.pairs} pairs and their questions need {4 * task.pairs + 2} tokens")

    def distinct(of: int) -> Tensor:  # [B, pairs], without repetition within a row
        return torch.rand(batch, of, generator=generator).argsort(dim=1)[:, : task.pairs]

    keys = FIRST_FREE + distinct(task.keys)
    values = FIRST_FREE + task.keys + torch.randint(task.values, (batch, task.pairs), generator=generator)
    first_filler = FIRST_FREE + task.keys + task.values
    ids = torch.randint(first_filler, first_filler + task.fillers, (batch, length), generator=generator)
    at = 1 + 2 * distinct(slots)  # [B, pairs], index of each key
    ids[:, 0] = BOS
    ids.scatter_(1, at, keys).scatter_(1, at + 1, values)
    ids[:, length - 1 - 2 * task.pairs] = QUESTIONS
    ids[:, length - 2 * task.pairs :: 2] = keys  # needles were placed at random, so this order is another one
    ids[:, length - 2 * task.pairs + 1 :: 2] = values
    answers = torch.arange(length - 2 * task.pairs + 1, length, 2).expand(batch, -1)
    labels = torch.full_like(ids, IGNORED).scatter_(1, answers, values)
    return Sequences(ids, labels, answers, at + 1)


def corrupt(sequences: Sequences, task: Task, *, generator: torch.Generator) -> Sequences:
    """The same questions over needles that hold other values; the labels are the old ones, which nothing supports."""
    first = FIRST_FREE + task.keys
    values = sequences.ids.gather(1, sequences.answers)
    other = torch.randint(1, task.values, values.shape, generator=generator)
    changed = first + (values - first + other) % task.values
    return Sequences(
        sequences.ids.scatter(1, sequences.needles, changed), sequences.labels, sequences.answers, sequences.needles
    )
