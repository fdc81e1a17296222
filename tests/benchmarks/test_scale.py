"""The formulas of the scale benchmark against what they stand for."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import scale
from longfit.attention.visibility import build_schedule, document_starts


@pytest.mark.parametrize(("tokens", "group"), [(512, 256), (1024, 256), (256, 256)])
def test_the_mean_number_of_keys_is_that_of_the_schedule(tokens: int, group: int) -> None:
    schedule = build_schedule(8, document_starts(1, tokens), group_size=group)
    seen = torch.arange(tokens) - schedule.host + 1  # [C, B, T], half of the heads in each class
    assert scale._shifted_keys(tokens, group) == pytest.approx(float(seen.float().mean()))


@pytest.mark.parametrize("kind", ["shifted", "exact"])
def test_compute_is_told_from_steps_of_known_cost(kind: str) -> None:
    known = scale.Compute(2e-6, 3e-9, 5e-7)
    tokens, long = scale.TOKENS, scale.TOKENS * scale.LONG
    steps = {
        "shifted": known.seconds(tokens, scale._shifted_keys(tokens, scale.GROUP)),
        "exact": known.seconds(tokens, (tokens + 1) / 2),
        "long": known.seconds(long, (long + 1) / 2),
        "with_itself": known.seconds(tokens, (tokens + 1) / 2, scale._projections(tokens, tokens // 2)),
    }
    found = scale.Compute.of(kind, **steps)
    # The slope is taken over TOKENS (LONG - 1) / 2 keys, which is what the two windows' means differ by.
    assert found == scale.Compute(*(pytest.approx(x) for x in (known.token_s, known.key_s, known.projection_s)))
