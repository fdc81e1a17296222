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


def test_compute_is_told_from_two_kinds_of_attention() -> None:
    known = scale.Compute(2e-6, 3e-9)
    grouped = scale._shifted_keys(scale.TOKENS, scale.GROUP)
    shifted, exact = known.seconds(scale.TOKENS, grouped), known.seconds(scale.TOKENS, (scale.TOKENS + 1) / 2)
    found = scale.Compute.of(shifted, exact)
    assert (found.token_s, found.key_s) == (pytest.approx(known.token_s), pytest.approx(known.key_s))
