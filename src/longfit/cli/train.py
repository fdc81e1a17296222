"""``longfit train MODEL DATA [run.yaml] [section.key=value]``: fine-tune, or resume."""

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from longfit.cli.output import print_json, print_lines, print_note, print_table, show_progress
from longfit.errors import ConfigError
from longfit.parallel.device_layout import choose_layout
from longfit.parallel.launch import INTERRUPTED, Place, is_started, start_processes
from longfit.words import format_bytes

if TYPE_CHECKING:
    from longfit.config import RunConfig
    from longfit.training.loop import TrainResult

CONTEXT, MEMORY, TRAINING, RUN = "Context", "Memory", "Training", "Run"


class Setting(NamedTuple):
    """An option that sets one key of the config: ``group_size`` is ``--group-size``."""

    name: str
    key: str
    panel: str
    help: str
    kind: type = str  # a text is converted by the config, which says what is allowed

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


SETTINGS = (
    Setting("context", "context.context", CONTEXT, "Tokens in a window; 16k = 16,384."),
    Setting("rope", "context.rope", CONTEXT, "yarn, linear, ntk, theta or none."),
    Setting("attention", "context.attention", CONTEXT, "exact or shifted."),
    Setting("group_size", "context.group_size", CONTEXT, "Tokens in a shifted group."),
    Setting("quant", "model.quant", MEMORY, "nf4, fp4, int4, int8 or none."),
    Setting("dtype", "model.dtype", MEMORY, "auto, float32, bfloat16 or float16."),
    Setting("engine", "engine.engine", MEMORY, "sweep or plain."),
    Setting("offload", "engine.offload", MEMORY, "device, ram, pinned or file."),
    Setting("stream", "engine.stream", MEMORY, "Frozen weights wait in ram or file."),
    Setting("optim", "optim.optim", MEMORY, "adamw or adamw8bit."),
    Setting("optim_budget", "optim.budget", MEMORY, "Resident state, as 2GiB."),
    Setting("optim_file", "optim.file", MEMORY, "File for paged-out state."),
    Setting("devices", "parallel.devices", MEMORY, "Processes to start, one a device."),
    Setting("shard", "parallel.shard", MEMORY, "Devices that share one copy of the weights."),
    Setting("sequence", "parallel.sequence", MEMORY, "Devices that share one window."),
    Setting("rank", "adapter.rank", TRAINING, "Rank of the adapters."),
    Setting("alpha", "adapter.alpha", TRAINING, "alpha / rank scales them."),
    Setting("train_embeddings", "adapter.train_embeddings", TRAINING, "Train embeddings too.", bool),
    Setting("train_norms", "adapter.train_norms", TRAINING, "Train norms too.", bool),
    Setting("validation", "data.validation", TRAINING, "Held-out text: a path."),
    Setting("steps", "train.steps", TRAINING, "Optimiser steps."),
    Setting("epochs", "train.epochs", TRAINING, "Passes over the data."),
    Setting("batch_size", "train.batch_size", TRAINING, "Windows in one pass."),
    Setting("gradient_accumulation", "train.gradient_accumulation", TRAINING, "Passes a step."),
    Setting("learning_rate", "train.learning_rate", TRAINING, "Peak learning rate."),
    Setting("seed", "train.seed", TRAINING, "Decides everything random."),
    Setting("run_dir", "output.run_dir", RUN, "Directory of the run."),
)
"""In the order of ``--help``. The other keys of the config have no option: ``section.key=value`` sets them."""


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Show typer, which reads a command's signature, an option for each of ``SETTINGS`` in place of ``**settings``."""
    first, *others, _ = inspect.signature(command, eval_str=True).parameters.values()
    shown = [
        inspect.Parameter(
            setting.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[setting.kind | None, typer.Option(help=setting.help, rich_help_panel=setting.panel)],
        )
        for setting in SETTINGS
    ]
    command.__signature__ = inspect.Signature([first, *shown, *others])  # type: ignore[attr-defined]
    return command


@takes_settings
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL DATA [run.yaml] [section.key=value]...",
            help="Base model (folder, hub id or .gguf), data (file or folder), and settings.",
            show_default=False,
        ),
    ] = None,
    *,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --run-dir.", rich_help_panel=RUN)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything but the steps; write nothing.", rich_help_panel=RUN)
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show every setting, its value and origin; train nothing.", rich_help_panel=RUN),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=RUN)] = False,
    **settings: object,
) -> None:
    """Fine-tune MODEL on DATA with low-rank adapters on a quantised base.

    Settings come from defaults, run.yaml, section.key=value and options; later ones win.
    """
    flags = {s.flag: (s.key, settings[s.name]) for s in SETTINGS if settings[s.name] is not None}
    config = read_settings(arguments or [], flags, resume=resume)
    if explain:
        _print_explained(config, as_json=as_json)
        return

    parallel = config.parallel
    if parallel.devices not in (None, 1) and not is_started(os.environ):
        devices = parallel.devices or 1
        if not resume:  # else the run's own settings count too, which its processes read
            choose_layout(devices, data=parallel.data, sequence=parallel.sequence, shard=parallel.shard)
        code = start_processes(sys.argv[1:], devices=devices)
        if code:
            raise typer.Exit(code)
        return

    from longfit.training.loop import train as run_training
    from longfit.training.rehearsal import rehearse

    if dry_run:
        if resume:
            raise ConfigError("--dry-run: a run that goes on has passed it already; drop --resume or --dry-run")
        with show_progress(quiet=as_json) as on_event:
            rehearsal = rehearse(config, on_event=on_event)
        if Place.of(os.environ).rank:  # one process speaks for all
            return
        if as_json:
            print_json(rehearsal)
            return
        print_lines(
            f"dry run: {rehearsal.total_steps:,} steps on {rehearsal.num_windows:,} windows, "
            f"{rehearsal.num_parameters:,} parameters, into {rehearsal.run_dir}; nothing was written"
        )
        return

    with show_progress(quiet=as_json) as on_event:
        result = run_training(config, on_event=on_event, resume=resume)
    if Place.of(os.environ).rank:  # one process speaks for all
        raise typer.Exit(0 if result.finished else INTERRUPTED)
    if as_json:
        print_json(result)
    else:
        print_lines(*summary(result))
    if not result.finished:
        print_note(f"stopped after step {result.steps} of {result.total_steps}; saved. Continue with:")
        print_note(f"  longfit train --run-dir {result.run_dir} --resume")
        raise typer.Exit(INTERRUPTED)


def read_settings(words: list[str], flags: Mapping[str, tuple[str, object]], *, resume: bool) -> "RunConfig":
    """Sort positional words into model, data, config file and overrides, and read the config.

    Args:
        words: what is not an option.
        flags: ``{flag: (key, value)}`` of the options that were given.
        resume: whether the run in ``--run-dir`` goes on: its settings come first.
    Raises: ConfigError: too many words, or settings that are wrong.
    """
    from longfit.config import load_config

    overrides = [word for word in words if re.match(r"\w+(\.\w+)?=", word) and not os.path.lexists(word)]
    files = [word for word in words if word not in overrides and Path(word).suffix in (".yaml", ".yml")]
    names = [word for word in words if word not in overrides and word not in files]
    if len(names) > 2 or len(files) > 1:
        extra = (names[2:] + files[1:])[0]
        raise ConfigError(f"{extra!r}: one word too many; longfit train MODEL DATA [run.yaml] [section.key=value]...")
    flags = {**flags, **{word: (key, name) for (word, key), name in zip(_NAMES, names, strict=False)}}
    if not resume:
        return load_config(*files, overrides=overrides, flags=flags)
    if "--run-dir" not in flags:
        raise ConfigError("--resume: which run? longfit train --run-dir RUN --resume")
    from longfit.training.run_directory import read_config

    run_dir = Path(str(flags["--run-dir"][1]))
    read_config(run_dir)  # says what is wrong if there is no run
    return load_config(run_dir / "config.yaml", *files, overrides=overrides, flags=flags)


_NAMES = (("MODEL", "model.name"), ("DATA", "data.path"))


def summary(result: "TrainResult") -> list[str]:
    """Return the last lines of a run: what happened, where it is, what to do next."""
    speed = result.tokens / result.seconds if result.seconds else 0.0
    lines = [
        f"{result.steps} steps, {result.tokens:,} tokens, {result.seconds:,.0f} s ({speed:,.0f} tokens/s), "
        f"peak memory {format_bytes(result.peak_memory_bytes)}",
        f"loss {result.first_loss:.4f} -> {result.loss:.4f}"
        + (f", validation {result.eval_loss:.4f}" if result.eval_loss is not None else ""),
    ]
    if result.finished:
        lines += [
            f"adapter: {result.run_dir / 'adapter'}",
            "next:",
            f"  longfit eval {result.run_dir} ppl --data HELD_OUT_TEXT",
            f"  longfit merge {result.run_dir} --out DIR     # one model, for transformers and vLLM",
            f"  longfit export {result.run_dir} --out DIR    # GGUF, for llama.cpp and Ollama",
            "  longfit runs",
        ]
    return lines


def _print_explained(config: "RunConfig", *, as_json: bool) -> None:
    rows = config.explain()
    if as_json:
        print_json(rows)
        return
    shown = [(row.key, "unset" if row.value is None else str(row.value), row.origin, row.meaning) for row in rows]
    print_table(("setting", "value", "from", "meaning"), shown)
