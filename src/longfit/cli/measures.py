"""What ``longfit eval`` measures, one function each: run it, print what it found."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from longfit.cli.output import print_json, print_lines, print_note, print_table, show_count
from longfit.cli.values import read_tokens
from longfit.errors import ConfigError

if TYPE_CHECKING:
    from longfit.config import RunConfig

MEASURES = ("report", "ppl", "passkey", "quant")


@dataclass(frozen=True)
class Asked:
    """What every measure is told.

    Attributes:
        target: a run directory, or a base model.
        measure: one of ``MEASURES``.
        settings: ``section.key=value`` words.
        flags: options that are settings: name -> key and value.
        tokens: options that are numbers of tokens, those that were given.
        data: held-out text, or the haystack of passkeys: a path.
        checkpoint: of a run.
        as_json: print the result as JSON.
    """

    target: str
    measure: str
    settings: Sequence[str]
    flags: Mapping[str, tuple[str, object]]
    tokens: Mapping[str, int]
    data: str | None
    checkpoint: str | None
    as_json: bool

    @classmethod
    def read(
        cls,
        target: str,
        words: Sequence[str],
        *,
        sizes: Mapping[str, str | None],
        flags: Mapping[str, tuple[str, object]],
        data: str | None,
        checkpoint: str | None,
        as_json: bool,
    ) -> Self:
        """Tell the measure from the settings among ``words``; read what is a number of tokens.

        Raises: ConfigError: no measure, more than one, one that does not exist, or a size that is no number of tokens.
        """
        settings = [word for word in words if "=" in word]
        named = [word for word in words if "=" not in word]
        if len(named) > 1:
            raise ConfigError(
                f"{named[1]!r}: one word too many; longfit eval {target} {named[0]} [section.key=value]..."
            )
        if not named and not _is_run(target):
            raise ConfigError(f"{target}: not a run; say what to measure of a base model: {', '.join(MEASURES[1:])}")
        measure = named[0] if named else "report"
        if measure not in MEASURES:
            raise ConfigError(f"{measure!r}: cannot be measured; one of {', '.join(MEASURES)}")
        given = {flag: (key, value) for flag, (key, value) in flags.items() if value is not None}
        tokens = {flag: read_tokens(flag, value) for flag, value in sizes.items() if value is not None}
        return cls(target, measure, settings, given, tokens, data, checkpoint, as_json)

    def config(self) -> "RunConfig":
        """The settings of the target, with those that were given."""
        from longfit.training.prepare import target_config

        return target_config(self.target, data=self.data, overrides=list(self.settings), flags=self.flags)

    def target_words(self) -> list[str]:
        """The words of a command that name the target and its settings."""
        flags = [word for flag, (_, value) in self.flags.items() for word in (flag, str(value))]
        return [self.target, *self.settings, *flags]


def _is_run(target: str) -> bool:
    return (Path(target) / "config.yaml").is_file()


def report(asked: Asked, *, trials: int | None, effort: float, with_passkey: bool) -> None:
    """Base against tuned, as a page."""
    from longfit.evaluation.compare import compare
    from longfit.evaluation.report import perplexity_table, summary, write_report

    window = asked.tokens.get("--window")
    comparison = compare(
        asked.target,
        config=asked.config(),
        data=asked.data,
        window=window,
        with_passkey=with_passkey,
        trials=trials,
        effort=effort,
        checkpoint=asked.checkpoint,
        progress=_progress,
    )
    options = {
        "--data": asked.data,
        "--window": window,
        "--trials": trials,
        "--checkpoint": asked.checkpoint,
        "--effort": None if effort == 1 else effort,
    }
    words = [str(word) for flag, value in options.items() if value is not None for word in (flag, value)]
    command = shlex.join(
        ["longfit", "eval", *asked.target_words(), *words, *(["--no-passkey"] if not with_passkey else [])]
    )
    page = write_report(comparison, command=command)
    if asked.as_json:
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


def perplexity(asked: Asked, *, convention: str) -> None:
    """Perplexity by position."""
    config, tokens = asked.config(), asked.tokens
    if asked.data is None:
        raise ConfigError("no text given: longfit eval RUN|MODEL ppl --data PATH")

    from longfit.evaluation.perplexity import perplexity as measure
    from longfit.training.prepare_data import native_context, read_path, read_token_ids
    from longfit.training.run_directory import seen_note

    model, tokenizer = _open(asked, config)
    token_ids = read_token_ids(asked.data, tokenizer, data=config.data, max_tokens=tokens.get("--max-tokens"))
    if note := seen_note(asked.target, read_path(asked.data, config.data)):
        print_note(f"warning: {note}")
    width = tokens.get("--window", native_context(model.config))
    num_tokens = sum(len(row) for row in token_ids)
    print_note(f"measuring {num_tokens:,} tokens of {len(token_ids):,} documents in windows of {width:,}")
    with show_count("windows") as on_progress:
        result = measure(
            model,
            token_ids,
            window=width,
            stride=tokens.get("--stride", width),
            convention=convention,
            on_progress=on_progress,
        )
    if asked.as_json:
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


def passkey(asked: Asked, *, lengths: list[int] | None, depths: list[float], trials: int, together: bool) -> None:
    """Retrieval of a number from a long text."""
    from longfit.evaluation.passkey import passkey as measure
    from longfit.training.prepare_data import native_context, read_path

    config = asked.config()
    documents = None
    if asked.data is not None:
        documents = [document.text for document in read_path(asked.data, config.data) if document.text is not None]
    model, tokenizer = _open(asked, config)
    context = native_context(model.config)
    lengths = lengths or [context // 4, context // 2, context]
    with show_count("trials") as on_progress:
        result = measure(
            model,
            tokenizer,
            lengths=lengths,
            depths=depths,
            trials=trials,
            documents=documents,
            together=together,
            on_progress=on_progress,
        )
    if asked.as_json:
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


def quant_error(
    asked: Asked, *, names: list[str] | None, block_sizes: list[int], low_rank: int, convention: str
) -> None:
    """What each data type costs a model."""
    from longfit.evaluation.quant_error import NAMES, data_types
    from longfit.evaluation.quant_error import quant_error as measure

    chosen = data_types(names=names or NAMES, block_sizes=block_sizes, low_rank=low_rank)
    model, tokenizer, config = _open_dense(asked)
    token_ids = _held_out(asked, tokenizer, config, longest=asked.tokens.get("--max-tokens"))
    with show_count("data types") as on_progress:
        rows = measure(
            model,
            token_ids,
            types=chosen,
            window=asked.tokens.get("--window", 2048),
            stride=asked.tokens.get("--stride"),
            convention=convention,
            on_progress=on_progress,
        )
    if asked.as_json:
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


def quant_plan(asked: Asked, *, budget: int) -> None:
    """Which layers deserve 8 bits within a budget of bytes."""
    from longfit.evaluation.quant_plan import quant_plan as make_plan

    model, tokenizer, config = _open_dense(asked)
    token_ids = _held_out(asked, tokenizer, config, longest=asked.tokens.get("--max-tokens") or 2048)
    plan = make_plan(model, token_ids, budget_bytes=budget)
    if asked.as_json:
        print_json(asdict(plan))
        return
    eight = set(plan.int8_modules)
    lines = [(layer.name, f"{layer.error:.4f}", "8" if layer.name in eight else "4") for layer in plan.layers]
    print_table(("layer", "error in NF4" + ", of its output" * (asked.data is not None), "bits"), lines)
    print_lines(f"{plan.nbytes:,} bytes; in a run's file: model: {{int8_modules: [{', '.join(plan.int8_modules)}]}}")


def _open(asked: Asked, config: "RunConfig") -> tuple[Any, Any]:
    from longfit.training.prepare import open_target

    print_note(f"loading {asked.target}")
    return open_target(asked.target, config=config, checkpoint=asked.checkpoint)


def _open_dense(asked: Asked) -> tuple[Any, Any, "RunConfig"]:
    """Load a base model in 16 or more bits, with its tokenizer and its settings.

    Raises: ConfigError: it is a run.
    """
    if _is_run(asked.target):
        raise ConfigError(f"{asked.target}: is a run, whose base is quantised already; give its base model")
    config = asked.config()
    if config.origin("model.quant") == "default":
        config = config.replace({"model.quant": "none"}, origin="auto: each data type is measured against it")
    return *_open(asked, config), config


def _held_out(asked: Asked, tokenizer: Any, config: "RunConfig", *, longest: int | None) -> Any:
    """The token ids of the text that was given, if one was."""
    if asked.data is None:
        return None

    from longfit.training.prepare_data import read_token_ids

    return read_token_ids(asked.data, tokenizer, data=config.data, max_tokens=longest)
