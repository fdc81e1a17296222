"""Machines: names, kept rates, and operations counted pair by pair."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.planning.configs import config

from longfit.errors import ConfigError
from longfit.kernels.cpu import elementwise as cpu_elementwise
from longfit.planning.machines import (
    GPUS,
    Rates,
    fused_kernels_here,
    gpu_bytes,
    read_rates,
    save_rates,
    step_flops,
    step_seconds,
)
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import ModelShape

SMOL = ModelShape.of(config("SmolLM2-135M"))
RATES = Rates("cpu", "a processor", matmul_flops=4e11, attention_flops=1e11, copy_bytes=1e10, disk_bytes=1e9)


def test_cards_by_name() -> None:
    assert gpu_bytes(" H100 ") == int(GPUS["h100"] * 2**30)
    with pytest.raises(ConfigError, match="allowed are t4"):
        gpu_bytes("h9000")


def test_a_plan_expects_the_kernels_that_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_kernels_here() == (cpu_elementwise.supported() is None)
    monkeypatch.setenv("LONGFIT_LIBRARY", "none.so")
    assert not fused_kernels_here()


def test_rates_are_kept_for_each_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGFIT_CACHE", str(tmp_path / "cache"))
    assert read_rates("cpu") is None
    path = save_rates(RATES)
    assert read_rates("cpu") == RATES
    assert read_rates("cuda") is None
    for damaged in ("{", "[]", '{"cpu": 3}', '{"cpu": {"device": "cpu"}}', "[" * 100_000):
        path.write_text(damaged)
        assert read_rates("cpu") is None  # a plan without time, and no refusal: the file is a convenience
    path.write_text(json.dumps({"cpu": {**asdict(RATES), "matmul_flops": 10**400}}))  # JSON has numbers beyond floats
    assert read_rates("cpu") is None
    assert save_rates(RATES) == path
    assert read_rates("cpu") == RATES


@pytest.mark.parametrize("group", [None, 256])
def test_operations_are_those_of_the_visible_pairs(group: int | None) -> None:
    context = 1024
    settings = PlanSettings(context, rank=8, attention="shifted" if group else "exact", group_size=group)
    linear, attention = step_flops(SMOL, settings)
    pairs = sum(query - query // (group or context) * (group or context) + 1 for query in range(context))
    # Forward, recomputed forward (two products each) and backward (five); half a pair a token is neglected.
    assert attention == pytest.approx(30 * 2 * 9 * pairs * 576, rel=2 / (group or context))
    adapters = 30 * 8 * (576 * 2 + (576 + 192) * 2 + 576 * 2 + (576 + 1536) * 3)
    assert linear == pytest.approx(context * (6 * (SMOL.linear_params + adapters) + 4 * 49_152 * 576), rel=1e-9)


def test_a_sliding_window_counts_its_band() -> None:
    shape = ModelShape.of(config("Mistral-7B"))
    context, window = 16_384, 4096
    pairs = sum(min(query + 1, window) for query in range(context))
    _, attention = step_flops(shape, PlanSettings(context))
    assert attention == pytest.approx(32 * 2 * 9 * pairs * 4096, rel=1e-3)


def test_seconds_are_a_range_and_grow_with_the_context() -> None:
    short, long = (step_seconds(SMOL, PlanSettings(tokens, device="cpu"), RATES) for tokens in (2048, 8192))
    assert 0 < short[0] < short[1] < long[1]
    assert long[0] > 4 * short[0]  # attention grows faster than the tokens
    slow_disk = step_seconds(SMOL, PlanSettings(8192, device="cpu", offload="file"), RATES)
    assert slow_disk[1] > long[1]
