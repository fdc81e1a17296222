"""``longfit plan MODEL``: will it fit, where the bytes go, and what would make it fit."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longfit.cli.output import print_json, print_lines, print_note, print_table
from longfit.cli.values import read_bytes, read_tokens
from longfit.errors import ConfigError
from longfit.words import format_bytes

if TYPE_CHECKING:
    from longfit.planning.plan import Plan
    from longfit.planning.settings import PlanSettings
    from longfit.planning.shapes import ModelShape

BAR_CELLS = 64
SMALLEST_LIMIT = 64 << 20  # bytes: less is a forgotten unit
GLYPHS = "█▓▒░▞▚▤▥▦▧▨▩"
COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta", "bright_green")
MACHINE, RUN = "Machine", "Run"


def plan(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf or config.json; no weights are read.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="As in train.", show_default=False)
    ] = None,
    *,
    context: Annotated[str | None, typer.Option(help="Tokens in a window; 16k = 16,384.", rich_help_panel=RUN)] = None,
    max_context: Annotated[
        bool, typer.Option("--max-context", help="Find the longest context that fits.", rich_help_panel=RUN)
    ] = False,
    vram: Annotated[
        str | None, typer.Option(help="Memory of the accelerator, as 24GiB.", rich_help_panel=MACHINE)
    ] = None,
    ram: Annotated[str | None, typer.Option(help="Host memory, as 64GiB.", rich_help_panel=MACHINE)] = None,
    disk: Annotated[str | None, typer.Option(help="Disk space, as 500GiB.", rich_help_panel=MACHINE)] = None,
    gpus: Annotated[
        str | None, typer.Option(help="A row for each: t4,3090,4090,a100-40,h100,h200.", rich_help_panel=MACHINE)
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Plan a run without an accelerator.", rich_help_panel=MACHINE)
    ] = False,
    devices: Annotated[
        int, typer.Option(min=1, help="Devices of this kind; a row for each way to share.", rich_help_panel=MACHINE)
    ] = 1,
    sequence: Annotated[int | None, typer.Option(help="Devices that share a window.", rich_help_panel=MACHINE)] = None,
    shard: Annotated[int | None, typer.Option(help="Devices that share the weights.", rich_help_panel=MACHINE)] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.", rich_help_panel=RUN)] = 16,
    attention: Annotated[str, typer.Option(help="exact or shifted.", rich_help_panel=RUN)] = "exact",
    group_size: Annotated[str | None, typer.Option(help="Tokens in a shifted group.", rich_help_panel=RUN)] = None,
    quant: Annotated[str, typer.Option(help="nf4, fp4, int4, int8 or none.", rich_help_panel=RUN)] = "nf4",
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=RUN)] = None,
    optim: Annotated[str, typer.Option(help="adamw or adamw8bit.", rich_help_panel=RUN)] = "adamw",
    optim_budget: Annotated[str | None, typer.Option(help="Resident state, as 2GiB.", rich_help_panel=RUN)] = None,
    offload: Annotated[str, typer.Option(help="device, ram or file.", rich_help_panel=RUN)] = "device",
    stream: Annotated[str, typer.Option(help="Frozen weights: none, ram or file.", rich_help_panel=RUN)] = "none",
    tile: Annotated[str | None, typer.Option(help="Tokens at once.", rich_help_panel=RUN)] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one pass.", rich_help_panel=RUN)] = 1,
    gradient_accumulation: Annotated[int, typer.Option(help="Passes a step.", rich_help_panel=RUN)] = 1,
    train_embeddings: Annotated[bool, typer.Option(help="Train embeddings too.", rich_help_panel=RUN)] = False,
    train_norms: Annotated[bool, typer.Option(help="Train norms too.", rich_help_panel=RUN)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say whether a run fits a machine, byte by byte, from the model's configuration alone.

    Without --vram, --gpus or --cpu the plan is for this machine.
    """
    from longfit.planning.shapes import read_shape

    said = _said(model, words or [], dtype)
    if max_context == (context is not None or "context" in said):
        raise ConfigError("a plan needs --context 32k, or --max-context to find the longest; not both")
    shape = read_shape(model)
    limits = _limits(vram=vram, ram=ram, disk=disk, gpus=gpus, cpu=cpu)
    on_cpu = gpus is None and "accelerator" not in limits
    settings = _settings(
        context=shape.native_context if context is None else read_tokens("--context", context),
        device="cpu" if on_cpu else "cuda",
        group_size=None if group_size is None else read_tokens("--group-size", group_size),
        tile=None if tile is None else read_tokens("--tile", tile),
        budget=None if optim_budget is None else read_bytes("--optim-budget", optim_budget),
        file=optim_budget is not None and on_cpu,
        **{"rank": rank, "attention": attention, "quant": quant, "optim": optim, "offload": offload, "stream": stream},
        **{"batch_size": batch_size, "gradient_accumulation": gradient_accumulation},
        **{"train_embeddings": train_embeddings, "train_norms": train_norms},
        **{"processes": devices, "sequence": sequence or 1, "shard": shard or 1},
    ).changed(said)
    devices = settings.processes
    sequence, shard = said.get("sequence", sequence), said.get("shard", shard)
    limits |= {place: limits[place] // devices for place in ("host", "disk") if place in limits}  # they share these
    if devices > 1 and (sequence is None or shard is None):
        if gpus is not None:
            raise ConfigError("--gpus: with --devices say --sequence and --shard too, or --vram of one kind")
        rows = sharing_rows(shape, settings, limits, sequence=sequence, shard=shard, max_context=max_context)
        _print_sharing(rows, as_json=as_json)
    elif gpus is not None:
        _print_gpus(shape, settings, limits, gpus, max_context=max_context, as_json=as_json)
    elif max_context:
        _print_longest(shape, settings, limits, as_json=as_json)
    else:
        _print_plan(model, shape, settings, limits, as_json=as_json)


def _said(model: str, words: Sequence[str], dtype: str | None) -> dict[str, Any]:
    """What ``section.key=value`` words say of a plan, under the plan's own names.

    Raises: ConfigError: words that are wrong.
    """
    from dataclasses import fields

    from longfit.config import load_config
    from longfit.planning.settings import PlanSettings

    flags: dict[str, tuple[str, object]] = {"MODEL": ("model.name", model), "DATA": ("data.path", "(none)")}
    if dtype is not None:
        flags["--dtype"] = ("model.dtype", dtype)
    config = load_config(overrides=words, flags=flags)
    flat, known = config.flat(), {field.name for field in fields(PlanSettings)} - {"device"}
    said: dict[str, Any] = {}
    for key in config.given():
        name, value = key.partition(".")[2], flat[key]
        if key in ("model.name", "data.path") or (key == "model.dtype" and value == "auto") or value is None:
            continue
        if key in ("data.validation", "data.validation_fraction"):
            said["evaluates"] = bool(value)
        elif key == "parallel.devices":
            said["processes"] = value
        elif key == "optim.file":
            said["file"] = True
        elif name in known:
            said[name] = tuple(value) if isinstance(value, list) else value
        else:
            print_note(f"{key}: changes no byte of the plan")
    return said


def _settings(**values: Any) -> "PlanSettings":
    from longfit.kernels.cpu import processor
    from longfit.planning.machines import fused_kernels_here
    from longfit.planning.settings import PlanSettings

    dtype, _ = processor.auto_dtype(values["device"])
    return PlanSettings(dtype=dtype, fused_kernels=fused_kernels_here(), **values)


def _limits(*, vram: str | None, ram: str | None, disk: str | None, gpus: str | None, cpu: bool) -> dict[str, int]:
    """Bytes by place: what was said, else what this machine has."""
    from longfit.planning.machines import this_gpu_bytes, this_host_bytes

    if cpu and (vram is not None or gpus is not None):
        raise ConfigError("--cpu: a plan without an accelerator; drop --vram and --gpus, or --cpu")
    if vram is not None and gpus is not None:
        raise ConfigError("--gpus: each has its own memory; drop --vram")
    said = {"accelerator": vram, "host": ram, "disk": disk}
    flags = {"accelerator": "--vram", "host": "--ram", "disk": "--disk"}
    limits = {place: read_bytes(flags[place], text) for place, text in said.items() if text is not None}
    for place, size in limits.items():
        if size < SMALLEST_LIMIT:
            raise ConfigError(f"{flags[place]} {said[place]}: is {size:,} bytes; did you mean {said[place]}GiB?")
    if vram is None and gpus is None:
        found = None if cpu else this_gpu_bytes()
        if found is not None:
            limits["accelerator"] = found
        limits.setdefault("host", this_host_bytes())
    return limits


# ------------------------------------------------------------------------------------------------ one plan
def _print_plan(
    name: str, shape: "ModelShape", settings: "PlanSettings", limits: Mapping[str, int], *, as_json: bool
) -> None:
    from longfit.planning.machines import read_rates
    from longfit.planning.plan import ladder_lines, plan_shape

    found = plan_shape(shape, settings, limits, name=name, rates=read_rates(settings.device))
    if as_json:
        print_json(found.to_dict())
        return
    print_lines(*headline(found), "")
    _print_places(found)
    _print_components(found)
    print_lines("", *ladder_lines(found))


def headline(found: "Plan") -> list[str]:
    """Say in a line or two what is planned and whether it fits."""
    s = found.settings
    run = f"{found.model}, {s.context:,} tokens, rank {s.rank}, {s.attention} attention, tiles of {found.memory.tile:,}"
    verdict = "fits" if found.fits else "does not fit"
    over = [
        f"{place} needs {format_bytes(found.peaks[place])}, has {format_bytes(limit)}"
        for place, limit in found.limits.items()
        if found.peaks[place] > limit
    ]
    lines = [run, f"{verdict}: " + "; ".join(over) if over else verdict]
    if found.seconds is not None:
        low, high = found.seconds
        lines.append(f"{low:,.0f} to {high:,.0f} s a step, from the rates measured on this machine")
    return lines


def _print_places(found: "Plan") -> None:
    """A bar for each limited place: its share of the memory there is, component by component."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for place in ("accelerator", "host", "disk"):
        peak = found.peaks[place]
        if not peak or (place == "disk" and place not in found.limits):
            continue
        limit = found.limits.get(place, peak)
        whole = max(peak, limit)
        text = Text(f"{place:<12}")
        for number, (_, size) in enumerate(found.memory.at_peak(place)):
            cells = round(BAR_CELLS * size / whole)
            text.append(GLYPHS[number % len(GLYPHS)] * cells, style=COLOURS[number % len(COLOURS)])
        if limit > peak:
            text.append("·" * max(0, BAR_CELLS - len(text.plain) + 12))
        of = f" of {format_bytes(limit)}" if place in found.limits else ""
        text.append(f" {format_bytes(peak)}{of}, in {found.memory.peak_phase(place)}")
        console.print(text)


def _print_components(found: "Plan") -> None:
    for place in ("accelerator", "host", "disk"):
        rows = [
            (GLYPHS[number % len(GLYPHS)], name, format_bytes(size))
            for number, (name, size) in enumerate(found.memory.at_peak(place))
        ]
        if rows:
            print_lines("")
            print_table(("", place, "bytes at the peak"), rows)


# ------------------------------------------------------------------------------------------------ the other way round
def _print_longest(shape: "ModelShape", settings: "PlanSettings", limits: Mapping[str, int], *, as_json: bool) -> None:
    rows = longest_rows(shape, settings, limits)
    if as_json:
        print_json([{"settings": name, "context": tokens, "paste": words} for name, tokens, words in rows])
        return
    print_table(("longest context", "with", "paste"), [(f"{tokens:,}", name, words) for name, tokens, words in rows])


def longest_rows(
    shape: "ModelShape", settings: "PlanSettings", limits: Mapping[str, int]
) -> list[tuple[str, int, str]]:
    """The longest context as the settings are, and with what leaves the run's numbers as they are and gives more."""
    from longfit.planning.ladder import longest_context, paste

    options: list[tuple[str, dict[str, Any]]] = [("these settings", {})]
    if settings.device == "cuda":
        options.append(("layer inputs in host memory", {"offload": "ram"}))
        options.append(("and weights streamed from there", {"offload": "ram", "stream": "ram"}))
        options.append(("everything in files", {"offload": "file", "stream": "file"}))
    else:
        options.append(("layer inputs in a file", {"offload": "file", "saved_attention": 0}))
    rows: list[tuple[str, int, str]] = []
    for name, changes in options:
        tokens = longest_context(shape, settings.changed(changes), limits)
        if not rows or tokens > max(row[1] for row in rows):  # where host memory binds, moving things there gives less
            rows.append((name, tokens, paste(changes)))
    return rows


def sharing_rows(
    shape: "ModelShape",
    settings: "PlanSettings",
    limits: Mapping[str, int],
    *,
    sequence: int | None,
    shard: int | None,
    max_context: bool,
) -> list[dict[str, object]]:
    """A row for every way in which the devices can share windows and weights, those that were said apart."""
    from longfit.planning.devices import sent_bytes
    from longfit.planning.ladder import longest_context
    from longfit.planning.memory import memory_plan

    count = settings.processes
    divisors = [number for number in range(1, count + 1) if count % number == 0]
    place = "accelerator" if settings.device == "cuda" else "host"
    rows = []
    for shared in divisors if shard is None else [shard]:
        for cut in divisors if sequence is None else [sequence]:
            chosen = settings.changed({"shard": shared, "sequence": cut})
            row: dict[str, object] = {"shard": shared, "sequence": cut, "windows at once": count // cut}
            if max_context:
                row["longest context"] = longest_context(shape, chosen, limits)
                if settings.device == "cuda":
                    in_ram = chosen.changed({"offload": "ram"})
                    row["with layer inputs in host memory"] = longest_context(shape, in_ram, limits)
                    longest = int(str(row["with layer inputs in host memory"]))
                    chosen = in_ram.changed({"context": max(longest, 1024)})
            memory = memory_plan(shape, chosen)
            row[place] = memory.peak(place)
            row["fits"] = memory.peak(place) <= limits.get(place, memory.peak(place))
            row["sent a step"] = sent_bytes(shape, chosen)
            row["paste"] = f"--devices {count} --shard {shared} --sequence {cut}"
            rows.append(row)
    return rows


def _print_sharing(rows: list[dict[str, object]], *, as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    columns: Sequence[str] = list(rows[0])
    shown = {"accelerator": format_bytes, "host": format_bytes, "sent a step": format_bytes}
    print_table(columns, [[_cell(row[column], shown.get(column)) for column in columns] for row in rows])


def _cell(value: object, shown: Callable[[int], str] | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if shown is None else shown(value)
    return str(value)


def _print_gpus(
    shape: "ModelShape",
    settings: "PlanSettings",
    limits: Mapping[str, int],
    names: str,
    *,
    max_context: bool,
    as_json: bool,
) -> None:
    from longfit.planning.machines import gpu_bytes
    from longfit.planning.plan import plan_shape

    rows: list[dict[str, object]] = []
    for name in names.split(","):
        there = {**limits, "accelerator": gpu_bytes(name)}
        found = plan_shape(shape, settings, there, name=name)
        row: dict[str, object] = {"gpu": name.strip(), "memory": format_bytes(there["accelerator"])}
        if not max_context:
            needs = found.peaks["accelerator"]
            row |= {
                "fits": "yes" if found.fits else "no",
                "accelerator": format_bytes(needs),
                "host": format_bytes(found.peaks["host"]),
            }
            row["to change"] = " ".join(suggestion.paste for suggestion in found.suggestions)
            if found.context_that_fits is not None:
                row["to change"] = f"{row['to change']} --context {found.context_that_fits}".strip()
        else:
            row |= {title: f"{tokens:,}" for title, tokens, _ in longest_rows(shape, settings, there)}
        rows.append(row)
    if as_json:
        print_json(rows)
        return
    columns: Sequence[str] = list(rows[0])
    print_table(columns, [[str(row[column]) for column in columns] for row in rows])
