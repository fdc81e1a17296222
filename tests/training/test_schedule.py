"""The learning rate over a run."""

import pytest

from longfit.training.schedule import learning_rate


def rates(**options: object) -> list[float]:
    return [learning_rate(step, 1.0, total_steps=20, warmup_steps=4, **options) for step in range(20)]  # type: ignore[arg-type]


def test_warm_up_rises_from_above_zero_to_the_peak() -> None:
    assert rates()[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_towards_zero_and_passes_half_in_the_middle() -> None:
    after = rates()[4:]
    assert after == sorted(after, reverse=True)
    assert after[8] == pytest.approx(0.5, abs=1e-15)  # 8 of 16 steps: cos(pi / 2) is zero up to its rounding
    assert 0 < after[-1] < 0.01  # (1 - cos(pi / 16)) / 2


def test_constant_stays() -> None:
    assert rates(schedule="constant")[4:] == [1.0] * 16


def test_no_warm_up_begins_at_the_peak() -> None:
    assert learning_rate(0, 3.0, total_steps=1, warmup_steps=0) == 3.0


def test_a_step_outside_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="must be from 0 to 19"):
        learning_rate(20, 1.0, total_steps=20, warmup_steps=4)
