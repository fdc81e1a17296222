"""A window keeps the tokens that stay in its range, wherever it moves, in storage of its capacity."""

import pytest
import torch

from longfit.engine.sweep.kv_window import KeyValueWindow

RANGES = {
    "grows": [(0, 3), (0, 7), (0, 12)],
    "slides": [(0, 4), (2, 7), (5, 10), (6, 12)],
    "turns back": [(6, 12), (5, 10), (2, 7), (0, 4)],
    "jumps": [(0, 5), (7, 12), (1, 4)],
}


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("slack", [0, 3])
def test_tokens_that_stay_in_the_range_stay_what_they_are(name: str, slack: int) -> None:
    key, value = torch.randn(2, 3, 12, 4), torch.randn(2, 3, 12, 5)
    capacity = max(high - low for low, high in RANGES[name]) + slack
    window = KeyValueWindow(key, value, capacity=capacity, dtype=torch.float64)
    known: set[int] = set()
    for low, high in RANGES[name]:
        window.move(low, high)
        known &= set(range(low, high))
        for token in range(low, high):
            for place, whole in zip(window.tokens(token, token + 1), (key, value), strict=True):
                assert place.dtype == torch.float64
                if token in known:
                    assert torch.equal(place.float(), whole[:, :, token : token + 1])
                else:
                    place.copy_(whole[:, :, token : token + 1])
        known = set(range(low, high))


def test_a_view_shows_the_range_and_nothing_outside() -> None:
    window = KeyValueWindow(torch.empty(1, 1, 9, 2), torch.empty(1, 1, 9, 3), capacity=4)
    window.move(3, 7)
    key, value = window.tokens(3, 7)
    assert (key.shape, value.shape) == ((1, 1, 4, 2), (1, 1, 4, 3))
    for low, high in ((2, 5), (5, 8)):
        with pytest.raises(AssertionError):
            window.tokens(low, high)
    with pytest.raises(AssertionError):
        window.move(0, 5)
