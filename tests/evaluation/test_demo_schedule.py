"""The demo goes as far as its time allows, and the shortest is taken where none is short enough."""

import pytest

from longfit.evaluation.demo_schedule import CHOICES, FIXED_S, LOADS, Speed, choose, group_of


def test_seconds_are_counted_by_hand() -> None:
    speed = Speed(load_s=7.0, token_s=0.01, attention_flops=1e9, pair_flops=100.0)
    # Three evaluations: 10 s each and 500,000 pairs twice, 0.1 s. Two steps: 30 s each and 125,000 pairs nine times.
    expected = LOADS * 7.0 + FIXED_S + 3 * (10 + 0.1) + 2 * (30 + 9 * 125_000 * 100 / 1e9)
    assert speed.seconds(context=1000, steps=2, group_size=250) == pytest.approx(expected)


def test_a_faster_machine_goes_further() -> None:
    chosen = [
        choose(Speed(5.0, token_s, 3e11, 34_560.0), within_s=420) for token_s in (1e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1.0)
    ]
    places = [CHOICES.index(each) for each in chosen]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, len(CHOICES) - 1)
    assert len(set(places)) > 2


@pytest.mark.parametrize(("context", "group"), [(14_336, 3_584), (10_240, 2_560), (1001, 250), (10, 2), (3, 2)])
def test_groups_are_even_quarters(context: int, group: int) -> None:
    assert group_of(context) == group
