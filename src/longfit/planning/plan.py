"""Will it fit? The public answer: a model, a run's settings, a machine's memory; bytes, and what to change."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longfit.errors import ConfigError
from longfit.kernels.cpu import processor
from longfit.planning.ladder import Suggestion, climb, excess, longest_context
from longfit.planning.machines import Rates, fused_kernels_here, step_seconds
from longfit.planning.memory import PLACES, MemoryPlan, memory_plan
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import ModelShape, read_shape
from longfit.words import format_bytes


@dataclass(frozen=True)
class Plan:
    """The memory of a run.

    Attributes:
        model: its name.
        settings: of the run.
        memory: by component, phase and place.
        limits: bytes there are, by place.
        fits: whether every place holds what it must.
        suggestions: what to change, cheapest first, where it does not fit; empty where it does.
        context_that_fits: where no ladder helps, the longest context that fits with all of it.
        seconds: of a step, from and to, if the machine's rates were measured.
    """

    model: str
    settings: PlanSettings
    memory: MemoryPlan
    limits: Mapping[str, int]
    fits: bool
    suggestions: tuple[Suggestion, ...]
    context_that_fits: int | None
    seconds: tuple[float, float] | None

    @property
    def peaks(self) -> dict[str, int]:
        """Most bytes at each place."""
        return {place: self.memory.peak(place) for place in PLACES}

    @property
    def device_place(self) -> str:
        """The place where the model is."""
        return "accelerator" if self.settings.device == "cuda" else "host"

    @property
    def device_peak(self) -> int:
        """Most bytes there."""
        return self.peaks[self.device_place]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        phases = ("load", *self.memory.phases, "merge")
        return {
            "model": self.model,
            "settings": asdict(self.settings),
            "tile": self.memory.tile,
            "fits": self.fits,
            "limits": dict(self.limits),
            "peaks": self.peaks,
            "peak_phases": {place: self.memory.peak_phase(place) for place in PLACES},
            "phases": {phase: {place: self.memory.bytes_in(place, phase) for place in PLACES} for phase in phases},
            "components": [
                {"name": c.name, "place": c.place, "by_phase": dict(c.by_phase)} for c in self.memory.components
            ],
            "ladder": [asdict(suggestion) for suggestion in self.suggestions],
            "context_that_fits": self.context_that_fits,
            "seconds_per_step": self.seconds,
        }


def plan(
    model: str | Path | Mapping[str, Any],
    *,
    context: int,
    vram: int | None = None,
    ram: int | None = None,
    disk: int | None = None,
    rates: Rates | None = None,
    **settings: Any,
) -> Plan:
    """Plan the memory of a run from the model's configuration; no weights are read.

    Args:
        model: hub id, folder, ``.gguf`` or ``config.json``, or a configuration as a dict.
        context: tokens in a window.
        vram: bytes of the accelerator; None plans a run on the CPU.
        ram, disk: bytes of host memory and of disk; None is no limit.
        rates: of the machine, for the time of a step.
        settings: the others, as in ``PlanSettings``: rank, optim, attention, offload, tile, train_embeddings, ...
    Returns: the plan; ``plan.fits``, ``plan.peaks``, ``plan.suggestions``, ``plan.to_dict()``.
    Raises: ModelError: an unknown, incomplete or encoder configuration. ConfigError: nonsense in the settings.
    """
    for name, value in (("vram", vram), ("ram", ram), ("disk", disk)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: must be a positive number of bytes, such as 24GiB")
    shape = read_shape(model)
    device = settings.pop("device", "cpu" if vram is None else "cuda")
    dtype, _ = processor.auto_dtype(device)
    defaults = PlanSettings(context=max(1, context), device=device, dtype=dtype, fused_kernels=fused_kernels_here())
    chosen = defaults.changed({"context": context, **settings})
    limits = {"accelerator": vram, "host": ram, "disk": disk}
    known = {place: limit for place, limit in limits.items() if limit is not None}
    name = "config" if isinstance(model, Mapping) else str(model)
    return plan_shape(shape, chosen, known, name=name, rates=rates)


def plan_shape(
    shape: ModelShape,
    settings: PlanSettings,
    limits: Mapping[str, int],
    *,
    name: str,
    rates: Rates | None = None,
    fixed: frozenset[str] = frozenset(),
) -> Plan:
    """Plan a run whose model and settings have been read.

    Args:
        limits: bytes by place; a place that is missing is not limited.
        fixed: settings that the ladder must leave alone.
    """
    memory = memory_plan(shape, settings)
    fits = not excess(memory, limits)
    suggestions: list[Suggestion] = []
    shorter: int | None = None
    if not fits:
        suggestions, changed = climb(shape, settings, limits, fixed=fixed)
        if excess(memory_plan(shape, changed), limits):
            shorter = longest_context(shape, changed, limits, most=settings.context)
    seconds = step_seconds(shape, settings, rates) if rates is not None else None
    return Plan(name, settings, memory, dict(limits), fits, tuple(suggestions), shorter, seconds)


def ladder_lines(found: Plan) -> list[str]:
    """What to change, as text that can be pasted."""
    if found.fits:
        return []
    lines = ["what would make it fit, cheapest first:"] if found.suggestions else []
    for number, suggestion in enumerate(found.suggestions, 1):
        frees = ", ".join(
            f"{'frees' if size > 0 else 'takes'} {format_bytes(abs(size))} of {place}"
            for place, size in suggestion.frees.items()
        )
        kind = "" if suggestion.exact else "; changes the numbers of the run"
        lines.append(f"  {number}. {suggestion.paste:<44} {suggestion.name}: {frees}; costs {suggestion.costs}{kind}")
    words = " ".join(suggestion.paste for suggestion in found.suggestions)
    if found.suggestions and found.suggestions[-1].fits:
        lines += ["paste:", f"  longfit train {found.model} DATA --context {found.settings.context} {words}"]
    elif found.context_that_fits:
        lines += [
            f"even so {found.settings.context:,} tokens do not fit; {found.context_that_fits:,} do:",
            f"  longfit train {found.model} DATA --context {found.context_that_fits} {words}",
        ]
    else:
        lines.append("no change makes it fit: this model needs a larger machine")
    return lines
