"""Numbers as people read them."""

import pytest

from longfit.words import format_bytes, sparkline, visible


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [
        (0, "0.0 MiB"),
        (1, "below 0.1 MiB"),
        (104_857, "below 0.1 MiB"),
        (104_858, "0.1 MiB"),
        (53.2 * 2**20, "53.2 MiB"),
        (0.1 * 2**30, "0.10 GiB"),
        (24 * 2**30, "24.00 GiB"),
        (1610 * 2**30, "1,610.00 GiB"),
        (-2 * 2**30, "-2.00 GiB"),
    ],
)
def test_a_size_is_said_in_the_unit_that_shows_it(num_bytes: float, said: str) -> None:
    assert format_bytes(num_bytes) == said


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([float("nan")], ""),
        ([2.0], "▄"),
        ([3.0, 3.0, 3.0], "▄▄▄"),
        ([0.0, 7.0], "▁█"),
        ([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0], "█▇▆▅▄▃▂▁"),
        ([1.0, float("inf"), 0.0], "█▁"),
    ],
)
def test_a_curve_is_a_line_of_bars(values: list[float], drawn: str) -> None:
    assert sparkline(values) == drawn


def test_a_long_curve_is_averaged_in_groups() -> None:
    assert sparkline([4.0, 2.0, 1.0, 1.0, 0.0], width=3) == "█▃▁"  # means 3, 1, 0
    assert len(sparkline([float(step) for step in range(1000)])) <= 24


NASTY = "a\x1b]0;owned\x07\x1b[31m\rb\u202ec\x9b2J\ud800:bug:[red]"


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert visible(NASTY) == r"a\x1b]0;owned\x07\x1b[31m\rb\u202ec\x9b2J\ud800:bug:[red]"
    assert visible("tab\tand line\nend, é, 字, ▁") == "tab\tand line\nend, é, 字, ▁"
