"""``longfit eval RUN``: base against tuned, as a report; or one measure alone, of a run or of a base model."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longfit.cli.output import print_json, print_lines, print_note, print_table, show_count
from longfit.cli.values import read_bytes, read_tokens
from longfit.errors import ConfigError

if TYPE_CHECKING:
    from longfit.config import RunConfig

MEASURES = ("report", "ppl", "passkey", "quant")
TEXT, PASSKEY, DATA_TYPES = "Text (report, ppl, quant)", "Passkey (report, passkey)", "Data types (quant)"


def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or a base model.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[report|ppl|passkey|quant] [section.key=value]...",
            help="report: base against tuned (default for a run). ppl: perplexity by position. passkey: retrieval."
            " quant: what each data type costs a model. Settings of model and data.",
            show_default=False,
        ),
    ] = None,
    *,
    data: Annotated[
        str | None, typer.Option(help="Held-out text, or the haystack of passkeys: a path.", rich_help_panel=TEXT)
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="Tokens read at once; default: what the model takes.", rich_help_panel=TEXT)
    ] = None,
    stride: Annotated[
        str | None, typer.Option(help="Tokens between windows; default: the window.", rich_help_panel=TEXT)
    ] = None,
    convention: Annotated[
        str, typer.Option(help="document or longlora: which tokens are scored.", rich_help_panel=TEXT)
    ] = "document",
    max_tokens: Annotated[
        str | None, typer.Option(help="Use only the first tokens of the text.", rich_help_panel=TEXT)
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="As 4k,8k,16k; default: parts of the context.", rich_help_panel=PASSKEY)
    ] = None,
    depths: Annotated[str, typer.Option(help="Of the key, 0 to 1.", rich_help_panel=PASSKEY)] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int | None, typer.Option(help="In each cell; default: 5.", rich_help_panel=PASSKEY)] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Hide the keys of all depths in one text.", rich_help_panel=PASSKEY)
    ] = False,
    no_passkey: Annotated[
        bool, typer.Option("--no-passkey", help="Leave it out of the report.", rich_help_panel=PASSKEY)
    ] = False,
    types: Annotated[
        str | None,
        typer.Option(help="Of int8,int8_rows,int4,fp4,mxfp4,nvfp4,nf4,quantile.", rich_help_panel=DATA_TYPES),
    ] = None,
    block_sizes: Annotated[str, typer.Option(help="As 32,64,128.", rich_help_panel=DATA_TYPES)] = "64",
    budget: Annotated[
        str | None,
        typer.Option(help="As 90MB: which layers deserve 8 bits in a base of NF4.", rich_help_panel=DATA_TYPES),
    ] = None,
    effort: Annotated[float, typer.Option(help="Of the report: 4 reads four times as much.")] = 1.0,
    quant: Annotated[str | None, typer.Option(help="nf4, fp4, int4, int8 or none; default: nf4, or the run's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: what is fast here.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Of a run: best, last or a name. Default: the best.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure whether a model reads further.

    A run directory is enough: base model, context and adapter are read from it. Attention is always exact.
    """
    is_run = (Path(target) / "config.yaml").is_file()
    settings = [word for word in words or [] if "=" in word]
    named = [word for word in words or [] if "=" not in word]
    if len(named) > 1:
        raise ConfigError(f"{named[1]!r}: one word too many; longfit eval {target} {named[0]} [section.key=value]...")
    measure = named[0] if named else None
    if measure is None and not is_run:
        raise ConfigError(f"{target}: not a run; say what to measure of a base model: {', '.join(MEASURES[1:])}")
    measure = measure or "report"
    if measure not in MEASURES:
        raise ConfigError(f"{measure!r}: cannot be measured; one of {', '.join(MEASURES)}")
    sizes = {"--window": window, "--stride": stride, "--max-tokens": max_tokens}
    tokens = {flag: read_tokens(flag, value) for flag, value in sizes.items() if value is not None}
    cells = [read_tokens("--lengths", part) for part in lengths.split(",")] if lengths else None
    shares = _read_depths(depths)
    flags = {"--quant": ("model.quant", quant), "--dtype": ("model.dtype", dtype)}
    given = {flag: (key, value) for flag, (key, value) in flags.items() if value is not None}
    target_words = [target, *settings, *(word for flag, (_, value) in given.items() for word in (flag, str(value)))]
    if measure == "quant" and budget is not None:
        _quant_plan(
            target, data, tokens.get("--max-tokens"), read_bytes("--budget", budget), settings, given, as_json=as_json
        )
        return
    if measure == "quant":
        _quant_error(
            target, data, tokens, convention, types.split(",") if types else None, block_sizes, settings, given,
            as_json=as_json,
        )  # fmt: skip
        return

    from longfit.training.prepare import target_config

    config = target_config(target, data=data, overrides=settings, flags=given)
    if measure == "report":
        _report(
            target_words, config, data, tokens.get("--window"), trials, effort, checkpoint,
            with_passkey=not no_passkey, as_json=as_json,
        )  # fmt: skip
    elif measure == "ppl":
        _perplexity(target, config, data, tokens, convention, checkpoint, as_json=as_json)
    else:
        _passkey(target, config, data, cells, shares, trials or 5, checkpoint, together=together, as_json=as_json)


def _report(
    target: list[str],
    config: "RunConfig",
    data: str | None,
    window: int | None,
    trials: int | None,
    effort: float,
    checkpoint: str | None,
    *,
    with_passkey: bool,
    as_json: bool,
) -> None:
    from longfit.evaluation.compare import compare
    from longfit.evaluation.report import perplexity_table, summary, write_report

    comparison = compare(
        target[0],
        config=config,
        data=data,
        window=window,
        with_passkey=with_passkey,
        trials=trials,
        effort=effort,
        checkpoint=checkpoint,
        progress=_progress,
    )
    options = {
        "--data": data,
        "--window": window,
        "--trials": trials,
        "--checkpoint": checkpoint,
        "--effort": None if effort == 1 else effort,
    }
    words = [str(word) for flag, value in options.items() if value is not None for word in (flag, value)]
    command = shlex.join(["longfit", "eval", *target, *words, *(["--no-passkey"] if not with_passkey else [])])
    page = write_report(comparison, command=command)
    if as_json:
        print_json(asdict(comparison) | {"report": str(page)})
        return
    head, *rows = perplexity_table(comparison)
    print_lines("perplexity by position, exact attention, on " + comparison.text, "")
    print_table(head, rows)
    print_lines("", *summary(comparison), "", f"Report: {page}")


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    print_note(name)
    with show_count("parts") as on_progress:
        yield on_progress


def _perplexity(
    target: str,
    config: "RunConfig",
    data: str | None,
    tokens: dict[str, int],
    convention: str,
    checkpoint: str | None,
    *,
    as_json: bool,
) -> None:
    if data is None:
        raise ConfigError("no text given: longfit eval RUN|MODEL ppl --data PATH")

    from longfit.evaluation.perplexity import perplexity
    from longfit.training.prepare import native_context, open_target, read_path, read_token_ids
    from longfit.training.run_directory import seen_note

    print_note(f"loading {target}")
    model, tokenizer = open_target(target, config=config, checkpoint=checkpoint)
    token_ids = read_token_ids(data, tokenizer, data=config.data, max_tokens=tokens.get("--max-tokens"))
    if note := seen_note(target, read_path(data, config.data)):
        print_note(f"warning: {note}")
    width = tokens.get("--window", native_context(model.config))
    num_tokens = sum(len(row) for row in token_ids)
    print_note(f"measuring {num_tokens:,} tokens of {len(token_ids):,} documents in windows of {width:,}")
    with show_count("windows") as on_progress:
        result = perplexity(
            model,
            token_ids,
            window=width,
            stride=tokens.get("--stride", width),
            convention=convention,
            on_progress=on_progress,
        )
    if as_json:
        print_json(asdict(result))
        return
    print_lines(
        f"perplexity {result.perplexity:.4f} over {result.num_tokens:,} tokens "
        f"(convention {result.convention}, window {result.window:,}, stride {result.stride:,})"
    )
    if result.unread_tokens:
        print_note(f"{result.unread_tokens:,} tokens are in no window: documents or their ends are too short")
    rows = [
        (f"{bucket.start:,} to {bucket.stop:,}", f"{bucket.num_tokens:,}", f"{bucket.perplexity:.4f}")
        for bucket in result.by_position
    ]
    print_table(("position in the window", "tokens", "perplexity"), rows)


def _passkey(
    target: str,
    config: "RunConfig",
    data: str | None,
    lengths: list[int] | None,
    depths: list[float],
    trials: int,
    checkpoint: str | None,
    *,
    together: bool,
    as_json: bool,
) -> None:
    from longfit.evaluation.passkey import passkey
    from longfit.training.prepare import native_context, open_target, read_path

    documents = None
    if data is not None:
        documents = [document.text for document in read_path(data, config.data) if document.text is not None]
    print_note(f"loading {target}")
    model, tokenizer = open_target(target, config=config, checkpoint=checkpoint)
    context = native_context(model.config)
    lengths = lengths or [context // 4, context // 2, context]
    with show_count("trials") as on_progress:
        result = passkey(
            model,
            tokenizer,
            lengths=lengths,
            depths=depths,
            trials=trials,
            documents=documents,
            together=together,
            on_progress=on_progress,
        )
    if as_json:
        print_json(asdict(result))
        return
    print_lines(
        f"{sum(trial.correct for trial in result.trials)} of {len(result.trials)} pass keys found:"
        f" {result.accuracy:.0%}, {result.low:.0%} to {result.high:.0%} (haystack: {result.haystack})"
    )
    rows = [
        (
            f"{cell.length:,}",
            f"{cell.depth:.0%}",
            f"{cell.num_correct}/{cell.num_trials}",
            f"{cell.low:.0%} to {cell.high:.0%}",
            f"{cell.key_nll:.2f}",
        )
        for cell in result.cells
    ]
    print_table(("length", "depth", "found", "95 % interval", "loss of the key"), rows)


def _quant_error(
    target: str,
    data: str | None,
    tokens: dict[str, int],
    convention: str,
    names: list[str] | None,
    block_sizes: str,
    settings: list[str],
    given: Mapping[str, tuple[str, object]],
    *,
    as_json: bool,
) -> None:
    from longfit.evaluation.quant_error import NAMES, data_types, quant_error
    from longfit.training.prepare import read_token_ids

    blocks = [read_tokens("--block-sizes", part) for part in block_sizes.split(",")]
    chosen = data_types(names=names or NAMES, block_sizes=blocks)
    model, tokenizer, config = _dense_target(target, data, settings, given)
    longest = tokens.get("--max-tokens")
    token_ids = None if data is None else read_token_ids(data, tokenizer, data=config.data, max_tokens=longest)
    with show_count("data types") as on_progress:
        rows = quant_error(
            model,
            token_ids,
            types=chosen,
            window=tokens.get("--window", 2048),
            stride=tokens.get("--stride"),
            convention=convention,
            on_progress=on_progress,
        )
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    lines = [
        (
            "as loaded" if row.data_type is None else str(row.data_type),
            f"{row.bits_per_param:.3f}",
            f"{row.relative_error:.4f}",
            "-" if row.perplexity is None else f"{row.perplexity:.4f}",
        )
        for row in rows
    ]
    print_table(("data type", "bits a parameter", "relative error", "perplexity"), lines)


def _quant_plan(
    target: str,
    data: str | None,
    max_tokens: int | None,
    budget: int,
    settings: list[str],
    given: Mapping[str, tuple[str, object]],
    *,
    as_json: bool,
) -> None:
    from longfit.evaluation.quant_plan import quant_plan
    from longfit.training.prepare import read_token_ids

    model, tokenizer, config = _dense_target(target, data, settings, given)
    longest = max_tokens or 2048
    token_ids = None if data is None else read_token_ids(data, tokenizer, data=config.data, max_tokens=longest)
    plan = quant_plan(model, token_ids, budget_bytes=budget)
    if as_json:
        print_json(asdict(plan))
        return
    eight = set(plan.int8_modules)
    lines = [(layer.name, f"{layer.error:.4f}", "8" if layer.name in eight else "4") for layer in plan.layers]
    print_table(("layer", "error in NF4" + ", of its output" * (data is not None), "bits"), lines)
    print(f"{plan.nbytes:,} bytes; in a run's file: model: {{int8_modules: [{', '.join(plan.int8_modules)}]}}")


def _dense_target(
    target: str, data: str | None, settings: list[str], given: Mapping[str, tuple[str, object]]
) -> tuple[Any, Any, "RunConfig"]:
    """Load a base model in 16 or more bits, with its tokenizer and its settings.

    Raises: ConfigError: it is a run.
    """
    if (Path(target) / "config.yaml").is_file():
        raise ConfigError(f"{target}: is a run, whose base is quantised already; give its base model")

    from longfit.training.prepare import open_target, target_config

    config = target_config(target, data=data, overrides=settings, flags=given)
    if config.origin("model.quant") == "default":
        config = config.replace({"model.quant": "none"}, origin="auto: each data type is measured against it")
    print_note(f"loading {target}")
    return *open_target(target, config=config), config


def _read_depths(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--depths {text}: must be numbers from 0 to 1, as 0,0.5,1") from None
