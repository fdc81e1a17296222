"""Sequences show every query exactly the keys that its schedule shows."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from longfit.attention import varlen as sequences_module
from longfit.attention.tile import QueryTile
from longfit.attention.varlen import Sequence, sequences, shared_heads, shares
from longfit.attention.visibility import build_schedule, document_starts

KINDS = ({}, {"group_size": 16}, {"group_size": 300}, {"sliding_window": 1}, {"sliding_window": 9})
DOCUMENTS = {
    "one": lambda tokens: {},
    "packed": lambda tokens: {"position_ids": (torch.arange(tokens) % 37)[None]},
    "tiny": lambda tokens: {"position_ids": (torch.arange(tokens) % 2)[None]},
    "single tokens": lambda tokens: {"position_ids": torch.zeros(1, tokens, dtype=torch.int64)},
    "padded": lambda tokens: {"attention_mask": (torch.arange(tokens) >= tokens // 3)[None]},
}


def assert_same_keys(cut: list[Sequence], first_key: Tensor) -> None:
    assert all(before.high == after.low for before, after in pairwise(cut))
    for sequence in cut:
        for token in range(sequence.low, sequence.high):
            low = sequence.first if sequence.window is None else max(sequence.first, token - sequence.window)
            assert low == int(first_key[token])


@pytest.mark.parametrize("seed", range(10))
def test_any_schedule_that_never_decreases(seed: int) -> None:
    """Ranges that stand still, slide, stand still again, jump; no schedule of ours does all of it."""
    torch.manual_seed(seed)
    first_key = torch.minimum(torch.randint(0, 2, (100,)).cumsum(0), torch.arange(100))
    first_key[60:] = first_key[60:].clamp(min=int(first_key[60]) + 5)
    assert_same_keys(sequences(first_key, 0), first_key)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_every_query_sees_what_the_schedule_shows(documents: str, kind: dict[str, int]) -> None:
    schedule = build_schedule(4, document_starts(1, 130, **DOCUMENTS[documents](130)), **kind)
    for first_key in schedule.host[:, 0]:
        for start, end in ((0, 130), (0, 1), (50, 100), (7, 8), (111, 130)):
            cut = sequences(first_key[start:end], start)
            assert [cut[0].low, cut[-1].high] == [start, end]
            assert_same_keys(cut, first_key)


def test_as_few_as_documents_and_groups() -> None:
    packed = build_schedule(4, document_starts(1, 100, position_ids=(torch.arange(100) % 40)[None]), sliding_window=9)
    assert [(s.low, s.high, s.first, s.window) for s in sequences(packed.host[0, 0, 5:], 5)] == [
        (5, 40, 0, 8), (40, 80, 40, 8), (80, 100, 80, 8),
    ]  # fmt: skip
    shifted = build_schedule(4, document_starts(1, 64), group_size=16)
    assert [len(sequences(first, 0)) for first in shifted.host[:, 0]] == [4, 5]


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (9, 3), (8, 1), (1, 1), (32, 8)])
@pytest.mark.parametrize("max_kv_heads", [1, 2, 100])
def test_every_head_is_shared_once_and_with_its_keys(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, max_kv_heads: int
) -> None:
    monkeypatch.setattr(sequences_module, "MAX_ELEMENTS", max_kv_heads * 8 * 3)  # keys of 8 tokens, 3 dimensions
    keys = torch.empty(2, kv_heads, 8, 3)
    schedule = build_schedule(heads, document_starts(2, 8), group_size=4)
    seen = []
    for share in shares(QueryTile(torch.empty(2, heads, 8, 3), keys, keys, schedule, 0, 1.0)):
        query_heads, key_heads = range(heads)[share.heads], range(kv_heads)[share.kv_heads]
        assert len(key_heads) <= max_kv_heads
        repeats = len(query_heads) // len(key_heads)
        for number, head in enumerate(query_heads):
            assert key_heads[number // repeats] == head // (heads // kv_heads)
            seen.append((share.row, head))
    assert sorted(seen) == [(row, head) for row in range(2) for head in range(heads)]


def test_a_class_inside_one_group_of_heads() -> None:
    assert list(shared_heads(1, 3, 8)) == [(slice(1, 3), slice(0, 1))]
