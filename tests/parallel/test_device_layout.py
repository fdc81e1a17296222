"""Cuts of a run that fit its devices, and what is said of those that do not."""

import pytest

from longfit.errors import ConfigError
from longfit.parallel.device_layout import DeviceLayout, choose_layout


def test_the_devices_of_a_window_are_neighbours() -> None:
    layout = choose_layout(6, sequence=3)
    assert (layout.data, layout.sharers_of_window()) == (2, [[0, 1, 2], [3, 4, 5]])
    assert [layout.window_of(rank) for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [layout.stretch_of(rank) for rank in range(6)] == [0, 1, 2, 0, 1, 2]


def test_one_device_is_a_layout_too() -> None:
    assert choose_layout(1) == DeviceLayout()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"devices": 6, "sequence": 4}, "parallel.sequence=4 does not divide 6 devices; try 3 or 6"),
        ({"devices": 8, "shard": 16}, "parallel.shard=16 does not divide 8 devices; try 8"),
        (
            {"devices": 4, "sequence": 2, "data": 4},
            "is 8 devices, there are 4; try parallel.data=2, or parallel.devices=8",
        ),
        ({"devices": 1, "asked": 2}, "longfit train --devices 2"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(settings: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_layout(**settings)
    assert told in str(caught.value)


def test_all_that_does_not_divide_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_layout(6, sequence=4, shard=5)
    assert len(str(caught.value).splitlines()) == 2
