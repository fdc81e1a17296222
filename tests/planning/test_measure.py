"""Measured rates are positive, and a plan has a time from them."""

from pathlib import Path

import pytest
import torch
from tests.planning.configs import FOLDER

from longfit.planning import measure as measuring
from longfit.planning.machines import read_rates, save_rates
from longfit.planning.plan import plan


def test_measured_rates_give_a_plan_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(measuring, "TURNS", 1)
    monkeypatch.setenv("LONGFIT_CACHE", str(tmp_path))
    found = measuring.measure_rates(torch.device("cpu"), name="a processor", folder=tmp_path, dtype="float32")
    assert found.dtype == "float32"
    assert min(found.matmul_flops, found.attention_flops, found.copy_bytes, found.disk_bytes) > 0
    save_rates(found)
    assert read_rates("cpu") == found
    timed = plan(FOLDER / "SmolLM2-135M.json", context=4096, rates=found)
    assert timed.seconds is not None
    assert 0 < timed.seconds[0] <= timed.seconds[1]
    assert plan(FOLDER / "SmolLM2-135M.json", context=4096).seconds is None
