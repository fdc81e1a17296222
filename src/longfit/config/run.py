"""`RunConfig`: everything that decides a run, and `load_config`, which reads one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import PrivateAttr, ValidationError

from longfit.config.problems import unknown_key, wrong_values
from longfit.config.sections import (
    SECTIONS,
    AdapterSection,
    ContextSection,
    DataSection,
    EngineSection,
    ModelSection,
    OptimSection,
    OutputSection,
    ParallelSection,
    Section,
    TrainSection,
    known_keys,
    meaning,
)
from longfit.config.source import Given, read_override, read_yaml
from longfit.errors import ConfigError

WARMUP_STEPS = 20  # LongLoRA, section 4.1


@dataclass(frozen=True)
class Explained:
    """One setting of a `RunConfig`: its dotted key, value, where the value came from, and what it means."""

    key: str
    value: object
    origin: str
    meaning: str


class RunConfig(Section):
    """Everything that decides a run; made by `load_config` or `RunConfig.of`, which report all mistakes at once."""

    model: ModelSection
    context: ContextSection = ContextSection()
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    engine: EngineSection = EngineSection()
    parallel: ParallelSection = ParallelSection()
    output: OutputSection = OutputSection()

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, settings: Mapping[str, object], *, origin: str = "python") -> "RunConfig":
        """Make a config from dotted keys: ``RunConfig.of({"model.name": "...", "data.path": "...", ...})``."""
        return _build([Given(key, value, origin) for key, value in settings.items()])

    def flat(self) -> dict[str, Any]:
        """Return all settings as ``{"section.key": value}``."""
        sections = self.model_dump(mode="json")
        return {f"{name}.{key}": value for name, values in sections.items() for key, value in values.items()}

    def explain(self) -> list[Explained]:
        """Return every setting with its value, origin (default, file:line, override, flag, auto) and meaning."""
        return [Explained(key, value, self.origin(key), meaning(key)) for key, value in self.flat().items()]

    def given(self) -> list[str]:
        """Return the dotted keys that somebody set; the others are at their defaults."""
        return [key for key in self._origins if not self._origins[key].startswith("auto")]

    def origin(self, key: str) -> str:
        """Return where the value of a dotted key came from."""
        return self._origins.get(key, "default")

    def replace(self, settings: Mapping[str, object], *, origin: str = "python") -> "RunConfig":
        """Return a validated copy with some settings changed, by dotted key; ``explain`` names ``origin`` for them."""
        flat = self.flat()
        kept = [Given(key, flat[key], source) for key, source in self._origins.items()]
        return _build([*kept, *(Given(key, value, origin) for key, value in settings.items())])

    def resolve(self, *, native_context: int) -> "RunConfig":
        """Fill the context, if it is not given.

        Args:
            native_context: tokens the base model was made for.
        """
        if self.context.context is not None:
            return self
        return self.replace({"context.context": native_context}, origin="auto: the native context of the model")

    def resolve_steps(self, *, num_windows: int, num_processes: int = 1) -> "RunConfig":
        """Fill what depends on the data: steps, from epochs, and warm-up.

        Args:
            num_windows: training windows of one epoch.
            num_processes: processes that each take ``batch_size`` windows at a time.
        """
        config, train = self, self.train
        if train.steps is None:
            epochs = 1.0 if train.epochs is None else train.epochs
            step_windows = train.batch_size * train.gradient_accumulation * num_processes
            steps = max(1, -(-round(num_windows * epochs) // step_windows))
            origin = f"auto: {epochs:g} epochs of {num_windows:,} windows, {step_windows} a step"
            config = config.replace({"train.steps": steps, "train.epochs": None}, origin=origin)
        if config.train.warmup_steps is None:
            warmup_steps = min(WARMUP_STEPS, (config.train.steps or 1) // 10)
            config = config.replace({"train.warmup_steps": warmup_steps}, origin="auto: at most a tenth of the run")
        return config

    def to_yaml(self) -> str:
        """Return YAML that `load_config` reads back to an equal config; unset settings are left out."""
        sections = self.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump({name: values for name, values in sections.items() if values}, sort_keys=False, width=120)


def load_config(
    *files: Path | str,
    overrides: Sequence[str] = (),
    flags: Mapping[str, tuple[str, object]] | None = None,
) -> RunConfig:
    """Read a config: defaults < YAML files < ``section.key=value`` overrides < flags.

    Args:
        files: YAML with the sections of `RunConfig`; later ones win.
        overrides: texts such as ``"train.learning_rate=2e-4"`` or ``"adapter.targets=[q_proj, v_proj]"``.
        flags: ``{"--group-size": ("context.group_size", 4096)}``: the flag as the user typed it, its key and value.
    Raises: ConfigError: with every mistake found, each on its own line.
    """
    given = [item for file in files for item in read_yaml(Path(file))]
    given += [read_override(text) for text in overrides]
    given += [Given(key, value, flag) for flag, (key, value) in (flags or {}).items()]
    return _build(given)


def _build(given: Sequence[Given]) -> RunConfig:
    """Validate section by section, so that a mistake in one does not hide those of the others."""
    known = set(known_keys())
    latest = {item.key: item for item in given if item.key in known}
    problems = [unknown_key(item) for item in given if item.key not in known]
    sections: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        values = {key.partition(".")[2]: item.value for key, item in latest.items() if key.startswith(f"{name}.")}
        try:
            sections[name] = section.model_validate(values)
        except ValidationError as error:
            problems += wrong_values(name, list(error.errors()), latest)
        problems += _wrong_though_replaced(name, section, values, given, latest)
    if problems:
        heading = "1 setting is wrong:" if len(problems) == 1 else f"{len(problems)} settings are wrong:"
        raise ConfigError("\n  ".join([heading, *problems]))
    config = RunConfig(**sections)
    config._origins.update({key: item.origin for key, item in latest.items()})
    return config


def _wrong_though_replaced(
    name: str, section: type[Section], values: Mapping[str, object], given: Sequence[Given], latest: Mapping[str, Given]
) -> list[str]:
    """Describe values of one section that are wrong, although a later one replaced them: nobody meant to write them."""
    problems = []
    for item in given:
        _, _, key = item.key.partition(".")
        if not item.key.startswith(f"{name}.") or item.key not in latest or latest[item.key] is item:
            continue
        try:
            section.model_validate({**values, key: item.value})
        except ValidationError as error:
            wrong = [problem for problem in error.errors() if problem["loc"][:1] == (key,)]
            problems += wrong_values(name, wrong, {**latest, item.key: item})
    return problems
