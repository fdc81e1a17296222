"""Which keys each tile needs: as few whole tiles as hold them, and each loaded once."""

import pytest

from longfit.attention.visibility import build_schedule, document_starts
from longfit.engine.sweep.visible_keys import VisibleKeys


@pytest.mark.parametrize(
    "pattern", [{}, {"sliding_window": 3}, {"group_size": 4}, {"sliding_window": 9}], ids=["all", "w3", "g4", "w9"]
)
@pytest.mark.parametrize(("num_tokens", "tile"), [(13, 3), (12, 4), (5, 8)])
def test_tiles_see_all_keys_of_their_schedule_and_load_each_once(
    num_tokens: int, tile: int, pattern: dict[str, int]
) -> None:
    schedule = build_schedule(4, document_starts(1, num_tokens), **pattern)
    visible = VisibleKeys.of(schedule, tile)
    assert len(visible.lows) == -(-num_tokens // tile)
    for index, low in enumerate(visible.lows):
        start, end = visible.span(index)
        furthest = int(schedule.first_key[:, :, start:end].min())
        assert low % tile == 0
        assert low <= furthest < low + tile  # as few whole tiles as hold them
        assert end - low <= visible.capacity
    loaded = [new for index in reversed(range(len(visible.lows))) for new in visible.new_tiles(index)]
    assert len(loaded) == len(set(loaded))
    # The last tile's window is stored by the pass itself, so every tile below it is loaded once.
    needed = {key // tile for index, low in enumerate(visible.lows) for key in range(low, visible.span(index)[0])}
    assert set(loaded) == needed
