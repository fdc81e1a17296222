"""``longfit train MODEL DATA [run.yaml] [section.key=value]``: fine-tune, or resume."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longfit.cli.output import gib, print_json, print_lines, print_note, print_table, show_progress
from longfit.errors import ConfigError

if TYPE_CHECKING:
    from longfit.config import RunConfig
    from longfit.training.loop import TrainResult

CONTEXT, MEMORY, TRAINING, RUN = "Context", "Memory", "Training", "Run"


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL DATA [run.yaml] [section.key=value]...",
            help="Base model (folder, hub id or .gguf), data (file or folder), and settings.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Tokens in a window; 16k = 16,384.", rich_help_panel=CONTEXT)
    ] = None,
    rope: Annotated[str | None, typer.Option(help="yarn, linear, ntk, theta or none.", rich_help_panel=CONTEXT)] = None,
    attention: Annotated[str | None, typer.Option(help="exact or shifted.", rich_help_panel=CONTEXT)] = None,
    group_size: Annotated[str | None, typer.Option(help="Tokens in a shifted group.", rich_help_panel=CONTEXT)] = None,
    quant: Annotated[str | None, typer.Option(help="nf4, fp4, int4 or none.", rich_help_panel=MEMORY)] = None,
    engine: Annotated[str | None, typer.Option(help="sweep or plain.", rich_help_panel=MEMORY)] = None,
    arena: Annotated[str | None, typer.Option(help="device, ram, pinned or file.", rich_help_panel=MEMORY)] = None,
    stream: Annotated[
        str | None, typer.Option(help="Frozen weights wait in ram or file.", rich_help_panel=MEMORY)
    ] = None,
    optim: Annotated[str | None, typer.Option(help="adamw or adamw8bit.", rich_help_panel=MEMORY)] = None,
    optim_budget: Annotated[str | None, typer.Option(help="Resident state, as 2GiB.", rich_help_panel=MEMORY)] = None,
    optim_file: Annotated[str | None, typer.Option(help="File for paged-out state.", rich_help_panel=MEMORY)] = None,
    rank: Annotated[str | None, typer.Option(help="Rank of the adapters.", rich_help_panel=TRAINING)] = None,
    alpha: Annotated[str | None, typer.Option(help="alpha / rank scales them.", rich_help_panel=TRAINING)] = None,
    train_embeddings: Annotated[
        bool | None, typer.Option(help="Train embeddings too.", rich_help_panel=TRAINING)
    ] = None,
    train_norms: Annotated[bool | None, typer.Option(help="Train norms too.", rich_help_panel=TRAINING)] = None,
    validation: Annotated[str | None, typer.Option(help="Held-out text: a path.", rich_help_panel=TRAINING)] = None,
    steps: Annotated[str | None, typer.Option(help="Optimiser steps.", rich_help_panel=TRAINING)] = None,
    epochs: Annotated[str | None, typer.Option(help="Passes over the data.", rich_help_panel=TRAINING)] = None,
    batch_size: Annotated[str | None, typer.Option(help="Windows in one pass.", rich_help_panel=TRAINING)] = None,
    gradient_accumulation: Annotated[str | None, typer.Option(help="Passes a step.", rich_help_panel=TRAINING)] = None,
    learning_rate: Annotated[str | None, typer.Option(help="Peak learning rate.", rich_help_panel=TRAINING)] = None,
    seed: Annotated[str | None, typer.Option(help="Decides everything random.", rich_help_panel=TRAINING)] = None,
    run_dir: Annotated[str | None, typer.Option(help="Directory of the run.", rich_help_panel=RUN)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --run-dir.", rich_help_panel=RUN)
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show every setting, its value and origin; train nothing.", rich_help_panel=RUN),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=RUN)] = False,
) -> None:
    """Fine-tune MODEL on DATA with low-rank adapters on a quantised base.

    Settings come from defaults, run.yaml, section.key=value and options; later ones win.
    """
    options = {
        "--context": ("context.context", context),
        "--rope": ("context.rope", rope),
        "--attention": ("context.attention", attention),
        "--group-size": ("context.group_size", group_size),
        "--quant": ("model.quant", quant),
        "--engine": ("engine.engine", engine),
        "--arena": ("engine.arena", arena),
        "--stream": ("engine.stream", stream),
        "--optim": ("optim.optim", optim),
        "--optim-budget": ("optim.budget", optim_budget),
        "--optim-file": ("optim.file", optim_file),
        "--rank": ("adapter.rank", rank),
        "--alpha": ("adapter.alpha", alpha),
        "--train-embeddings": ("adapter.train_embeddings", train_embeddings),
        "--train-norms": ("adapter.train_norms", train_norms),
        "--validation": ("data.validation", validation),
        "--steps": ("train.steps", steps),
        "--epochs": ("train.epochs", epochs),
        "--batch-size": ("train.batch_size", batch_size),
        "--gradient-accumulation": ("train.gradient_accumulation", gradient_accumulation),
        "--learning-rate": ("train.learning_rate", learning_rate),
        "--seed": ("train.seed", seed),
        "--run-dir": ("output.run_dir", run_dir),
    }
    config = read_settings(arguments or [], options, resume=resume)
    if explain:
        _print_explained(config, as_json=as_json)
        return

    from longfit.training import loop

    with show_progress(quiet=as_json) as on_event:
        result = loop.train(config, on_event=on_event, resume=resume)
    if as_json:
        print_json(result)
    else:
        print_lines(*summary(result))
    if not result.finished:
        print_note(f"stopped after step {result.steps} of {result.total_steps}; saved. Continue with:")
        print_note(f"  longfit train --run-dir {result.run_dir} --resume")
        raise typer.Exit(130)


def read_settings(words: list[str], options: Mapping[str, tuple[str, object]], *, resume: bool) -> "RunConfig":
    """Sort positional words into model, data, config file and overrides, and read the config.

    Raises: ConfigError: too many words, or settings that are wrong.
    """
    from longfit.config import load_config

    overrides = [word for word in words if re.match(r"\w+(\.\w+)?=", word)]
    files = [word for word in words if word not in overrides and Path(word).suffix in (".yaml", ".yml")]
    names = [word for word in words if word not in overrides and word not in files]
    if len(names) > 2 or len(files) > 1:
        extra = (names[2:] + files[1:])[0]
        raise ConfigError(f"{extra!r}: one word too many; longfit train MODEL DATA [run.yaml] [section.key=value]...")
    flags = {flag: (key, value) for flag, (key, value) in options.items() if value is not None}
    flags |= {word: (key, name) for (word, key), name in zip(_NAMES, names, strict=False)}
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
        f"peak memory {gib(result.peak_memory_bytes)}",
        f"loss {result.first_loss:.4f} -> {result.loss:.4f}"
        + (f", validation {result.eval_loss:.4f}" if result.eval_loss is not None else ""),
    ]
    if result.finished:
        lines += [
            f"adapter: {result.run_dir / 'adapter'}",
            "next:",
            f"  longfit eval {result.run_dir} ppl --data HELD_OUT_TEXT",
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
