"""Replicas on two processes (DDP) against one process, and what used to hang."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.parallel.forked import run_in_processes
from tests.training.conftest import MakeConfig

from longfit.config import RunConfig
from longfit.errors import ProcessesError
from longfit.training.loop import train


def run(rank: int, config: RunConfig) -> dict[str, Any]:
    result = train(config)
    return {"loss": result.loss, "eval_loss": result.eval_loss, "peak": result.peak_memory_bytes}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_learn_what_one_learns_from_twice_the_windows(make_config: MakeConfig, tmp_path: Path) -> None:
    """Losses in float32, each a sum over some 100 tokens added in another order: a few units in the last place."""
    settings = {"data__validation_fraction": 0.2, "train__eval_every": 1, "train__steps": 3}
    one = make_config(**settings, train__gradient_accumulation=2, output__run_dir=str(tmp_path / "one"))
    train(one)
    results = run_in_processes(run, 2, make_config(**settings, output__run_dir=str(tmp_path / "two")), group=False)
    assert results[0]["eval_loss"] == results[1]["eval_loss"]
    alone, together = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for before, after in zip(alone, together, strict=True):
        for key in before.keys() & {"loss", "grad_norm", "eval_loss"}:
            assert after[key] == pytest.approx(before[key], rel=1e-6)
        assert (after["step"], after.get("tokens")) == (before["step"], before.get("tokens"))
    steps = [record for record in together if "loss" in record]
    assert all(len(record["peak_memory_bytes_by_process"]) == 2 for record in steps)


@pytest.mark.parametrize("num_windows", [1, 3])
def test_processes_may_have_different_numbers_of_validation_windows(
    make_config: MakeConfig, tmp_path: Path, num_windows: int
) -> None:
    settings = {"data__validation_fraction": 0.4, "data__validation_windows": num_windows, "train__steps": 2}
    results = run_in_processes(run, 2, make_config(**settings, model__quant="nf4", train__eval_every=1), group=False)
    assert results[0]["eval_loss"] == results[1]["eval_loss"] is not None
    assert metrics(tmp_path / "run")[-1]["eval_windows"] == num_windows


@pytest.mark.parametrize(
    "settings", [{"context__attention": "shifted", "context__group_size": 32}, {}], ids=["shifted", "exact"]
)
def test_two_processes_that_share_windows_learn_what_one_learns(
    make_config: MakeConfig, tmp_path: Path, settings: dict[str, object]
) -> None:
    """In float32, as above."""
    settings = {**settings, "data__validation_fraction": 0.2, "train__eval_every": 2, "train__steps": 2}
    train(make_config(**settings, output__run_dir=str(tmp_path / "one")))
    run_in_processes(run, 2, make_config(**settings, parallel__sequence=2), group=False)
    alone, together = metrics(tmp_path / "one"), metrics(tmp_path / "run")
    for before, after in zip(alone, together, strict=True):
        for key in before.keys() & {"loss", "grad_norm", "eval_loss", "tokens", "trained_tokens"}:
            assert after[key] == pytest.approx(before[key], rel=1e-6)
    assert all(min(record["halo_bytes_by_process"]) > 0 for record in together if "loss" in record)


def differ(rank: int, config: RunConfig) -> str:
    try:
        train(config.replace({"train.learning_rate": 1e-4 * (rank + 1)}))
    except ProcessesError as error:
        return str(error)
    return "trained"


def test_processes_with_different_settings_do_not_begin(make_config: MakeConfig, tmp_path: Path) -> None:
    told = run_in_processes(differ, 2, make_config(), group=False)
    assert told[0] == told[1]
    assert "train.learning_rate: process 0 has 0.0001; process 1 has 0.0002" in told[0]
    assert not (tmp_path / "run").exists()
