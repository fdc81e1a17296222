"""Runs of one length laid out together lie where one after the other would put them."""

from bisect import bisect_left, insort
from hashlib import blake2b

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from longfit.data.best_fit import best_fit_decreasing, ranks


def one_by_one(lengths: list[int], context: int, ties: list[bytes]) -> list[list[int]]:
    """Best fit decreasing as it is told: each run into the fullest window that has room, the last such one first."""
    windows: list[list[int]] = []
    spaces: list[int] = []
    windows_with: dict[int, list[int]] = {}
    for run in sorted(range(len(lengths)), key=lambda run: (-lengths[run], ties[run])):
        nearest = bisect_left(spaces, lengths[run])
        if nearest == len(spaces):
            windows.append([])
            space, window = context, len(windows) - 1
        else:
            space = spaces[nearest]
            window = windows_with[space].pop()
            if not windows_with[space]:
                del windows_with[space], spaces[nearest]
        windows[window].append(run)
        if left := space - lengths[run]:
            if left not in windows_with:
                insort(spaces, left)
                windows_with[left] = []
            windows_with[left].append(window)
    return windows


@given(context=st.integers(1, 40), seed=st.integers(-3, 3), data=st.data())
@settings(max_examples=300, deadline=None)
def test_windows_are_those_of_one_run_after_the_other(context: int, seed: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, context), min_size=1, max_size=60))
    numbers = np.stack([np.arange(len(lengths)), np.asarray(lengths)], axis=1)
    key = seed.to_bytes(16, "little", signed=True)
    digests = [blake2b(row.astype("<i8").tobytes(), digest_size=16, key=key).digest() for row in numbers]
    order, bounds = best_fit_decreasing(np.asarray(lengths), context, ties=ranks(seed, numbers))
    found = [order[bounds[w] : bounds[w + 1]].tolist() for w in range(len(bounds) - 1)]
    assert found == one_by_one(lengths, context, digests)


def test_ranks_are_pinned_across_machines_and_versions() -> None:
    expected = blake2b(bytes([7, *[0] * 15]), digest_size=16, key=bytes([3, *[0] * 15])).digest()
    (rank,) = ranks(3, np.asarray([[7, 0]])).tolist()
    assert b"".join(half.to_bytes(8, "big") for half in rank) == expected
