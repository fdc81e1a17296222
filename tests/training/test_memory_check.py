"""A run is planned, refused, fitted, tried, and carried over one lack of memory."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longfit.config import RunConfig
from longfit.engine.loss.training_loss import training_loss
from longfit.engine.sweep.sweeper import sweeper_of
from longfit.errors import PlanError
from longfit.planning.memory import HOST_BASE_BYTES, memory_plan
from longfit.planning.plan import Plan, plan
from longfit.training import distribute, memory_check, prepare
from longfit.training.loop import train
from longfit.training.memory_check import StepDown, machine_limits, plan_run, plan_settings
from longfit.training.metrics import Event

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")
LACK = RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried ...")


def small_plan() -> Plan:
    shape = Path(__file__).parents[1] / "data" / "configs" / "SmolLM2-135M.json"
    return plan(shape, context=8192, ram=1 << 34, dtype="bfloat16")


def test_a_plan_takes_every_setting_of_a_run(make_config: MakeConfig) -> None:
    settings = {
        **{"adapter.rank": 5, "optim.optim": "adamw8bit", "optim.budget": 1 << 20, "optim.file": "f"},
        **{"engine.tile": 32, "engine.offload": "file", "train.batch_size": 3, "engine.saved_attention": 7},
    }
    found = plan_settings(make_config(**settings), device=CPU, native_context=64)
    assert (found.rank, found.optim, found.budget, found.file) == (5, "adamw8bit", 1 << 20, True)
    assert (found.tile, found.offload, found.batch_size, found.saved_attention) == (32, "file", 3, 7)
    assert found.device == "cpu"


def test_what_cannot_fit_is_refused_before_anything_is_written(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "machine_limits", lambda device, run_dir, *, processes: {"host": 1 << 20})
    with pytest.raises(PlanError, match="host: needs"):
        train(make_config())
    assert not list(tmp_path.glob("run*"))


def test_what_is_left_free_is_chosen_so_that_it_fits(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(__file__).parents[1] / "data" / "configs" / "SmolLM2-135M.json"
    events: list[Event] = []
    config = make_config(**{"context.context": 16_384, "model.name": str(model)})
    asked = memory_plan(memory_check.read_shape(model), plan_settings(config, device=CPU, native_context=64))
    less = asked.peak("host") - (100 << 20)
    monkeypatch.setattr(memory_check, "machine_limits", lambda device, run_dir, *, processes: {"host": less})
    changed, found = plan_run(config, Path("runs/x"), device=CPU, on_event=events.append)
    assert found is not None
    assert found.fits
    assert changed.engine.tile is not None or changed.engine.saved_attention == 0
    assert "to fit, chosen" in events[0].text
    assert found.memory.peak("host") <= less
    forced = config.replace({"engine.tile": 4096, "engine.saved_attention": 1 << 29, "engine.offload": "device"})
    with pytest.raises(PlanError, match="cheapest first"):
        plan_run(forced, Path("runs/x"), device=CPU, on_event=events.append)


def test_a_run_that_goes_on_keeps_its_tile_where_anything_else_makes_it_fit(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tile adds numbers in another order, so it would have other losses than the unbroken run."""
    model = Path(__file__).parents[1] / "data" / "configs" / "SmolLM2-135M.json"
    config = make_config(**{"context.context": 16_384, "model.name": str(model)})
    shape = memory_check.read_shape(model)
    settings = plan_settings(config, device=CPU, native_context=64)
    smaller_tile = memory_plan(shape, settings.changed({"tile": settings.tile_tokens(shape) // 2})).peak("host")
    not_saved = memory_plan(shape, settings.changed({"saved_attention": 0})).peak("host")
    whole = memory_plan(shape, settings).peak("host")
    events: list[Event] = []

    def choose(limit: int, *, resumes: bool) -> RunConfig:
        monkeypatch.setattr(memory_check, "machine_limits", lambda device, run_dir, *, processes: {"host": limit})
        return plan_run(config, Path("runs/x"), device=CPU, on_event=events.append, resumes=resumes)[0]

    enough = max(smaller_tile, not_saved)
    assert enough < whole
    assert choose(enough, resumes=False).engine.tile is not None
    kept = choose(enough, resumes=True).engine
    assert (kept.tile, kept.saved_attention) == (None, 0)
    assert not [event for event in events if event.kind == "warning"]
    assert choose(not_saved - 1, resumes=True).engine.tile is not None
    (warning,) = [event for event in events if event.kind == "warning"]
    assert warning.text.endswith("losses may differ from an unbroken run in rounding")


@pytest.mark.parametrize(
    ("settings", "parallelism", "told"),
    [
        ({"engine.engine": "plain"}, "NO", "engine plain"),
        ({}, "FSDP", "FSDP: of several processes only those that longfit divides"),
        ({"adapter.targets": ["q_proj", "lm_head"]}, "NO", "targets lm_head: an adapter there is not planned"),
    ],
)
def test_a_run_without_a_plan_starts_and_is_told_why(
    make_config: MakeConfig, settings: dict[str, Any], parallelism: str, told: str
) -> None:
    events: list[Event] = []
    config = make_config(**settings)
    found = plan_run(config, Path("runs/x"), device=CPU, on_event=events.append, parallelism=parallelism)
    assert found == (config, None)
    assert events[0].text.startswith("no memory plan: ")
    assert told in events[0].text


def test_processes_share_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 << 30))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert machine_limits(CPU, tmp_path, processes=8)["host"] == (1 << 30) + HOST_BASE_BYTES
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # of eight on two machines
    assert machine_limits(CPU, tmp_path, processes=8)["host"] == (2 << 30) + HOST_BASE_BYTES


def test_after_one_lack_of_memory_the_step_runs_again_with_less() -> None:
    found, events, changes = small_plan(), [], []
    step_down = StepDown(found, lambda suggestion: changes.append(suggestion), events.append)
    calls = iter([LACK, None])

    def step() -> float:
        failure = next(calls)
        if failure is not None:
            raise failure
        return 1.5

    assert step_down.run(step) == 1.5
    (suggestion,) = changes
    before, after = (
        memory_plan(memory_check.read_shape(found.model), s)
        for s in (found.settings, found.settings.changed(suggestion.changes))
    )
    assert after.peak("host") < before.peak("host")
    assert "the largest component is attention saved for backward" in events[0].text
    assert suggestion.paste in events[0].text


def test_the_second_lack_stops_and_other_errors_pass() -> None:
    def lack() -> float:
        raise LACK

    def bug() -> float:
        raise RuntimeError("shapes do not match")

    changes: list[Any] = []
    step_down = StepDown(small_plan(), changes.append, lambda event: None)
    with pytest.raises(RuntimeError, match="shapes"):
        step_down.run(bug)
    with pytest.raises(PlanError, match="largest component"):
        step_down.run(lack)
    assert len(changes) == 1
    with pytest.raises(PlanError, match="shorten"):
        StepDown(None, changes.append, lambda event: None).run(lack)


def lacking_in_backward(patch: pytest.MonkeyPatch, *, calls: range) -> None:
    """Let memory run out at the end of the backward pass of some calls of the loss."""
    number = count()  # the first call is the rehearsal

    def loss_of(model: Any, *args: Any, **options: Any) -> torch.Tensor:
        lacks = next(number) in calls
        loss = training_loss(model, *args, **options)
        if lacks:
            first = next(p for p in model.parameters() if p.requires_grad)
            handle = first.register_post_accumulate_grad_hook(lambda _: (handle.remove(), lack()))
        return loss

    def lack() -> None:
        raise LACK

    patch.setattr(distribute, "training_loss", loss_of)


@pytest.mark.parametrize("stream", ["none", "file"])
def test_a_run_goes_on_at_the_same_step_with_the_same_losses(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    plain = train(make_config(**{"output.run_dir": str(tmp_path / "plain")}))
    streams: list[Any] = []
    change = prepare.change_sweep

    def change_sweep(model: Any, **settings: Any) -> None:
        streams.append(sweeper_of(model).weights)
        change(model, **settings)
        streams.append(sweeper_of(model).weights)

    monkeypatch.setattr(prepare, "change_sweep", change_sweep)
    lacking_in_backward(monkeypatch, calls=range(2, 3))
    warned: list[str] = []
    broken = train(
        make_config(**{"output.run_dir": str(tmp_path / "broken"), "engine.stream": stream}),
        on_event=lambda event: warned.append(event.text) if event.kind == "warning" else None,
    )
    assert any("out of memory" in text and "again with" in text for text in warned)
    assert streams[0] is streams[1]
    assert (streams[0] is None) == (stream == "none")
    assert broken.steps == plain.steps
    assert broken.loss == pytest.approx(plain.loss, rel=1e-4)  # float32 sums in another order after smaller tiles
    written = json.loads((tmp_path / "broken" / "plan.json").read_text())
    assert written["measured_peak_bytes"] == broken.peak_memory_bytes
    assert written["planned_peak_bytes"] == written["peaks"]["host"]


def test_a_second_lack_leaves_the_state_saved(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking_in_backward(monkeypatch, calls=range(2, 99))
    with pytest.raises(PlanError, match=r"step 2: out of memory.*The state before it is in"):
        train(make_config(**{"output.run_dir": str(tmp_path / "run")}))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
