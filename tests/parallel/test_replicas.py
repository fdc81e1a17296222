"""Replicas on two processes (DDP) against one process, and what used to hang."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.parallel.forked import run_in_processes
from tests.training.conftest import MakeConfig

from longfit.config import RunConfig
from longfit.errors import ProcessesError
from longfit.exporting.merge import merge
from longfit.training.loop import train
from longfit.training.prepare import open_run


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


@pytest.mark.parametrize(("num_windows", "shard"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_processes_may_have_different_numbers_of_validation_windows(
    make_config: MakeConfig, tmp_path: Path, num_windows: int, shard: int
) -> None:
    settings = {"data__validation_fraction": 0.4, "data__validation_windows": num_windows, "train__steps": 2}
    config = make_config(**settings, model__quant="nf4", train__eval_every=1, parallel__shard=shard)
    results = run_in_processes(run, 2, config, group=False)
    assert results[0]["eval_loss"] == results[1]["eval_loss"] is not None
    assert metrics(tmp_path / "run")[-1]["eval_windows"] == num_windows


SHIFTED = {"context__attention": "shifted", "context__group_size": 32}


@pytest.mark.parametrize(
    ("settings", "shard"), [(SHIFTED, 1), ({}, 1), (SHIFTED, 2)], ids=["shifted", "exact", "shifted and sharded"]
)
def test_two_processes_that_share_windows_learn_what_one_learns(
    make_config: MakeConfig, tmp_path: Path, settings: dict[str, object], shard: int
) -> None:
    """In float32, as above."""
    settings = {**settings, "data__validation_fraction": 0.2, "train__eval_every": 2, "train__steps": 2}
    train(make_config(**settings, output__run_dir=str(tmp_path / "one")))
    run_in_processes(run, 2, make_config(**settings, parallel__sequence=2, parallel__shard=shard), group=False)
    alone, together = metrics(tmp_path / "one"), metrics(tmp_path / "run")
    for before, after in zip(alone, together, strict=True):
        for key in before.keys() & {"loss", "grad_norm", "eval_loss", "tokens", "trained_tokens"}:
            assert after[key] == pytest.approx(before[key], rel=1e-6)
    assert all(min(record["halo_bytes_by_process"]) > 0 for record in together if "loss" in record)


def go_on(rank: int, config: RunConfig) -> bool:
    return train(config, resume=True).finished


def test_a_sharded_run_goes_on_in_one_process_and_on_two(make_config: MakeConfig, tmp_path: Path) -> None:
    """Adapters and optimiser state are saved whole; losses in float32, as above."""
    settings: dict[str, object] = {
        "model__quant": "nf4", "train__steps": 6, "train__save_every": 2, "train__keep_checkpoints": 9,
        "adapter__train_norms": True, "adapter__train_embeddings": True, "data__validation_fraction": 0.2,
    }  # fmt: skip
    train(make_config(**settings, train__gradient_accumulation=2, output__run_dir=str(tmp_path / "one")))
    sharded = make_config(**settings, parallel__shard=2)
    run_in_processes(run, 2, sharded, group=False)
    alone, whole = metrics(tmp_path / "one"), metrics(tmp_path / "run")
    for before, after in zip(alone, whole, strict=True):
        for key in before.keys() & {"loss", "grad_norm", "eval_loss", "tokens", "trained_tokens"}:
            assert after[key] == pytest.approx(before[key], rel=1e-5)
    saved = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "run")]
    assert saved[0].keys() == saved[1].keys()
    assert all(saved[0][name].shape == saved[1][name].shape for name in saved[0])

    def break_off_after_four(folder: Path) -> None:
        shutil.copytree(tmp_path / "run", folder)
        shutil.rmtree(folder / "checkpoints" / "step-000006")
        shutil.rmtree(folder / "adapter")

    break_off_after_four(tmp_path / "two")
    resumed = make_config(**settings, parallel__shard=2, output__run_dir=str(tmp_path / "two"))
    assert run_in_processes(go_on, 2, resumed, group=False) == [True, True]
    assert numbers(tmp_path / "two") == numbers(tmp_path / "run")
    break_off_after_four(tmp_path / "more")
    more = make_config(**settings, parallel__shard=2, parallel__sequence=2, output__run_dir=str(tmp_path / "more"))
    assert run_in_processes(go_on, 4, more, group=False) == [True] * 4
    for before, after in zip(numbers(tmp_path / "run"), numbers(tmp_path / "more"), strict=True):
        assert after == pytest.approx(before, rel=1e-5)
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "more")]
    for name, tensor in adapters[0].items():
        assert torch.allclose(adapters[1][name].float(), tensor.float(), atol=1e-5)
    break_off_after_four(tmp_path / "fewer")
    train(make_config(output__run_dir=str(tmp_path / "fewer"), parallel__shard=1, **settings), resume=True)
    for before, after in zip(numbers(tmp_path / "run"), numbers(tmp_path / "fewer"), strict=True):
        assert after == pytest.approx(before, rel=1e-5)


def test_a_sharded_run_of_shared_windows_is_opened_and_merged_as_any_other(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """The merged model was read back and compared before `merge` returns; logits of float32 runs as above."""
    settings: dict[str, object] = {"model__quant": "nf4", "train__steps": 2}
    train(make_config(**settings, output__run_dir=str(tmp_path / "one")))
    shared = make_config(**settings, parallel__shard=2, parallel__sequence=2, output__run_dir=str(tmp_path / "two"))
    run_in_processes(run, 2, shared, group=False)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        alone, together = (open_run(tmp_path / name)[0](input_ids=ids).logits for name in ("one", "two"))
    assert torch.allclose(alone, together, rtol=1e-5, atol=1e-5)
    merge(tmp_path / "two", tmp_path / "merged", onto="4bit", measure=False)
    assert (tmp_path / "merged" / "config.json").is_file()


def numbers(folder: Path) -> list[float]:
    return [record[key] for record in metrics(folder) for key in ("loss", "grad_norm", "eval_loss") if key in record]


def differ(rank: int, config: RunConfig) -> str:
    try:
        train(config.replace({"train.learning_rate": 1e-4 * (rank + 1)}))
    except ProcessesError as error:
        return str(error)
    return "trained"


def differ_in_data(rank: int, config: RunConfig, folders: list[str]) -> str:
    os.chdir(folders[rank])
    return differ(0, config)


def test_processes_with_different_data_do_not_begin(make_config: MakeConfig, tmp_path: Path) -> None:
    """One path, behind which each process has a file of its own, as machines do."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(f"This is what {name} machine has. " * 99)
    config = make_config(data__path="/proc/self/cwd/text.txt")
    told = run_in_processes(differ_in_data, 2, config, [str(tmp_path / "one"), str(tmp_path / "other")], group=False)
    assert told[0] == told[1]
    assert "training data text.txt: process 0 has" in told[0]
    assert not (tmp_path / "run").exists()


def test_processes_with_different_settings_do_not_begin(make_config: MakeConfig, tmp_path: Path) -> None:
    told = run_in_processes(differ, 2, make_config(), group=False)
    assert told[0] == told[1]
    assert "train.learning_rate: process 0 has 0.0001; process 1 has 0.0002" in told[0]
    assert not (tmp_path / "run").exists()
