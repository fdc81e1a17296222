"""Will this run fit? Planned before anything is loaded, refused with what would make it fit, checked at the end.

    plan_run    plans a run on its machine; chooses tile and place of layer inputs where the run leaves them free
    StepDown    runs a step's passes; when memory runs out in spite of the plan, steps down once and goes on

A plan is advice where it cannot know (an unknown family, plain checkpointing): the run is told so and starts.
Not here: the arithmetic (`planning/`), and making room by moving optimiser state (`optimizer.py:relieve`).
"""

import gc
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from longfit.compat.torch import is_out_of_memory
from longfit.config import RunConfig
from longfit.errors import ModelError, PlanError
from longfit.kernels.cpu import processor
from longfit.parallel.agreement import least
from longfit.planning import constant_bytes
from longfit.planning.ladder import KEYS, Suggestion, climb, excess, step_down
from longfit.planning.machines import fused_kernels_here, read_rates
from longfit.planning.memory import HOST_BASE_BYTES, memory_plan
from longfit.planning.plan import Plan, ladder_lines, plan_shape
from longfit.planning.settings import PlanSettings, UnplannedError
from longfit.planning.shapes import ModelShape, read_shape
from longfit.training.checkpoint import folder_bytes
from longfit.training.metrics import Event, OnEvent
from longfit.words import format_bytes

PLANNED_PARALLELISM = ("NO", "MULTI_GPU", "MULTI_CPU")
"""Accelerate's names of one process, and of several devices that longfit divides the work between."""


def plan_settings(config: RunConfig, *, device: torch.device, native_context: int, processes: int = 1) -> PlanSettings:
    """Take what a plan needs from the settings of a run.

    Args:
        device: where the run will be.
        native_context: of the model, for a run without a context.
        processes: of a data-parallel run.
    """
    flat = {key.partition(".")[2]: value for key, value in config.flat().items()}
    taken: dict[str, Any] = {field.name: flat[field.name] for field in fields(PlanSettings) if field.name in flat}
    taken |= {
        "context": flat["context"] or native_context,
        "device": device.type,
        "dtype": processor.auto_dtype(device.type)[0] if flat["dtype"] == "auto" else flat["dtype"],
        "file": flat["file"] is not None,
        "evaluates": bool(flat["validation"] or flat["validation_fraction"]),
        "experts": flat["experts"],
        "targets": flat["targets"] if isinstance(flat["targets"], str) else tuple(flat["targets"]),
        "fused_kernels": fused_kernels_here(),
        "processes": processes,
    }
    return PlanSettings(**taken)


def plan_run(
    config: RunConfig,
    run_dir: Path,
    *,
    device: torch.device,
    on_event: OnEvent,
    processes: int = 1,
    parallelism: str = "NO",
    resumes: bool = False,
) -> tuple[RunConfig, Plan | None]:
    """Plan a run on this machine, and choose what it leaves free so that it fits; in all of its processes alike.

    Args:
        run_dir: where its checkpoints go.
        device: where it runs.
        processes: of a data-parallel run.
        parallelism: Accelerate's name for how they divide the work.
        resumes: whether the run was begun before: its tile then stays, as another adds numbers in another order,
            unless nothing else makes it fit what is free by now.
    Returns: the config, perhaps with a smaller tile or another place for layer inputs; the plan, None if there is none.
    Raises: PlanError: it cannot fit; the message says what would make it fit.
    """
    limits = least(machine_limits(device, run_dir, processes=processes))
    try:
        _require_planned(config, device, parallelism)
        shape = read_shape(config.model.name)
        settings = plan_settings(config, device=device, native_context=shape.native_context, processes=processes)
        constant_bytes.require_known_targets(shape, settings)
    except (UnplannedError, ModelError) as error:
        on_event(Event("phase", f"no memory plan: {error}"))
        return config, None
    given = frozenset(name for name, key in KEYS.items() if key in config.given())
    suggestions, changed = _fit(shape, settings, limits, given, resumes=resumes)
    plan = plan_shape(shape, changed, limits, name=config.model.name, rates=read_rates(device.type), fixed=given)
    if not plan.fits:
        asked = plan_shape(shape, settings, limits, name=config.model.name)
        raise PlanError("\n".join(["this run does not fit this machine:", *_overfull(asked), *ladder_lines(asked)]))
    if suggestions:
        chosen = [keys_of(suggestion) for suggestion in suggestions]
        config = config.replace(
            {key: value for keys in chosen for key, value in keys.items()}, origin="auto: the memory plan"
        )
        pasted = " ".join(suggestion.paste for suggestion in suggestions)
        if resumes and changed.tile != settings.tile:
            on_event(Event("warning", f"to fit, chosen: {pasted}: losses may differ from an unbroken run in rounding"))
        else:
            on_event(Event("phase", f"to fit, chosen: {pasted}"))
    limit = limits[plan.device_place]
    text = f"planned peak: {format_bytes(plan.device_peak)} of {format_bytes(limit)} {plan.device_place} memory"
    on_event(Event("phase", text, {"planned_peak_bytes": plan.device_peak}))
    return config, plan


def _fit(
    shape: ModelShape, settings: PlanSettings, limits: dict[str, int], given: frozenset[str], *, resumes: bool
) -> tuple[list[Suggestion], PlanSettings]:
    if resumes:
        suggestions, changed = climb(shape, settings, limits, fixed=given | {"tile"}, silent=True)
        if not excess(memory_plan(shape, changed), limits):
            return suggestions, changed
    return climb(shape, settings, limits, fixed=given, silent=True)


def _require_planned(config: RunConfig, device: torch.device, parallelism: str) -> None:
    """Raise UnplannedError for what trains but has no plan, whatever the model."""
    if config.engine.engine == "plain":
        raise UnplannedError("engine plain differentiates whole layers; only swept training is planned")
    if device.type not in ("cpu", "cuda"):
        raise UnplannedError(f"device {device.type}: only a CPU or a CUDA device is planned")
    if parallelism not in PLANNED_PARALLELISM:
        raise UnplannedError(f"{parallelism}: of several processes only those that longfit divides are planned")


def keys_of(suggestion: Suggestion) -> dict[str, Any]:
    """Return a suggestion's changes under the names of a run's settings."""
    return {KEYS[name]: value for name, value in suggestion.changes.items()}


def machine_limits(device: torch.device, run_dir: Path, *, processes: int = 1) -> dict[str, int]:
    """Bytes that a process may take: those free now, and those of the libraries that it has imported already.

    Processes of a data-parallel run share the host, as far as they are on this machine (``LOCAL_WORLD_SIZE``).
    """
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    limits = {"host": int(psutil.virtual_memory().available) // sharing + HOST_BASE_BYTES}
    if device.type == "cuda":
        limits["accelerator"] = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
    limits["disk"] = shutil.disk_usage(existing).free + folder_bytes(run_dir)  # a resumed run has its files already
    return limits


def _overfull(plan: Plan) -> list[str]:
    lines = []
    for place, limit in plan.limits.items():
        if plan.peaks[place] > limit:
            largest = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.memory.at_peak(place)[:3])
            needed = format_bytes(plan.peaks[place])
            lines.append(f"  {place}: needs {needed}, has {format_bytes(limit)}; most of it is {largest}")
    return lines


def plan_json(plan: Plan, *, measured_bytes: int | None = None) -> str:
    """The text of ``plan.json``; ``measured_bytes`` is the peak at the end of the run."""
    outcome = {"planned_peak_bytes": plan.device_peak, "measured_peak_bytes": measured_bytes}
    return json.dumps({**outcome, **plan.to_dict()}, indent=1) + "\n"


def compare(plan: Plan, measured_bytes: int) -> str:
    """Say how far the measured peak is from the planned one."""
    off = measured_bytes / plan.device_peak - 1
    return (
        f"peak memory: planned {format_bytes(plan.device_peak)}, measured {format_bytes(measured_bytes)} ({off:+.1%})"
    )


# ------------------------------------------------------------------------------------------------ out of memory
class StepDown:
    """Runs what allocates; when memory runs out, changes the run once and runs it again."""

    def __init__(self, plan: Plan | None, change: Callable[[Suggestion], None], on_event: OnEvent) -> None:
        """Plan for a run.

        Args:
            plan: of the run; without one there is nothing to step down to.
            change: makes a suggestion's changes in the running model.
        """
        self._plan, self._change, self._notify = plan, change, on_event
        self._shape: ModelShape | None = None if plan is None else read_shape(plan.model)
        self._spent = False

    def run(self, function: Callable[[], float]) -> float:
        """Call ``function``, which must be fit to be called again.

        Raises: PlanError: memory ran out a second time, or nothing can be changed; the state is whole.
        """
        reason = None
        try:
            return function()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        suggestion = self._next_suggestion()  # outside of the handler, whose frames keep the step's tensors alive
        if suggestion is None:
            raise PlanError(f"out of memory ({reason}){self._largest()}; {self._advice()}")
        self._spent = True
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self._notify(Event("warning", f"out of memory ({reason}){self._largest()}; again with {suggestion.paste}"))
        self._change(suggestion)
        return self.run(function)

    def _next_suggestion(self) -> Suggestion | None:
        if self._spent or self._plan is None or self._shape is None:
            return None
        return step_down(self._shape, self._plan.settings, self._plan.device_place)

    def _largest(self) -> str:
        """Name what takes most of what is not the model itself."""
        if self._plan is None:
            return ""
        fixed = ("4-bit layers", "linear layers", "embedding and output matrix", "Python and its libraries")
        held = [pair for pair in self._plan.memory.at_peak(self._plan.device_place) if pair[0] not in fixed]
        return f"; the largest component is {held[0][0]}, planned at {format_bytes(held[0][1])}" if held else ""

    def _advice(self) -> str:
        if self._plan is None:
            return "shorten --context, or free memory, and resume the run"
        return "free memory, or choose a smaller engine.tile, engine.offload=file or optim.budget, and resume the run"
