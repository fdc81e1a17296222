"""A finished run against its base: does the tuned model read further, and what did that cost inside the native context?

One model object goes through its states, and each is measured on the same held-out text with exact attention:

    base        as it was loaded
    extended    with the run's positions, before any training; left out where the run did not extend
    tuned       with the run's adapter

Three measures. *Perplexity by position* in windows of the whole context shows where a model stops predicting. *Passkey*
shows whether a distant token can be found. *Short context* compares base and tuned window by window inside what the
base was made for, because an extension that hurts there is no gain; its verdict needs a difference of two standard
errors.

How much is read is a budget of tokens, not of documents, so that the comparison takes minutes on a CPU; ``effort``
multiplies it.
"""

import dataclasses
import inspect
import math
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longfit.config import RunConfig
from longfit.errors import ConfigError, DataError
from longfit.evaluation.passkey import PasskeyResult, passkey
from longfit.evaluation.passkey_prompts import shortest_prompt
from longfit.evaluation.perplexity import PerplexityResult, perplexity
from longfit.evaluation.tokens import encode
from longfit.model.save import load_adapter
from longfit.training import run_directory
from longfit.training.prepare import extend, load_base
from longfit.training.prepare_data import native_context, read_data, read_path, tokenize

OnProgress = Callable[[int, int], Any]
Progress = Callable[[str], AbstractContextManager[OnProgress | None]]

LONG_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 19}
"""Read for perplexity by position in each state. Two cores with AVX512-BF16 read 14,336 tokens of SmolLM2-135M in about
35 s (65 s of processor time, more than half of it attention): three states, the pass keys and the short windows of the
demo's run stay below five minutes. An accelerator reads 50 times as many in the time."""

SHORT_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 18}
PASSKEY_TOKENS = {"cpu": 3 << 13, "cuda": 1 << 20}
"""Read for pass keys in each of two states: in windows of 14,336 tokens one trial in the middle of half and of all."""

SHORT_WINDOW = 512  # many windows give a spread; long enough to be more than the begin of a text
MOST_TRIALS = 5
PASSKEY_GRIDS = (  # parts of the window, depths; the richest first
    ((4, 2, 1), (0.0, 0.25, 0.5, 0.75, 1.0)),
    ((4, 2, 1), (0.0, 0.5, 1.0)),
    ((2, 1), (0.0, 0.5, 1.0)),
    ((2, 1), (0.5, 1.0)),
    ((2, 1), (0.5,)),
)
BUCKETS = 16  # positions are shown in so many buckets or fewer
MARGIN_NATS = 0.01  # 1 % of perplexity: less is no regression that anybody would notice


@dataclass(frozen=True)
class State:
    """The model in one state, and what was measured of it.

    Attributes:
        name: ``"base"``, ``"extended"`` or ``"tuned"``.
        long: perplexity by position in windows of the context.
        short: in windows inside the native context; None for ``"extended"``.
        passkey: None for ``"extended"``, or if none was asked for.
    """

    name: str
    long: PerplexityResult
    short: PerplexityResult | None
    passkey: PasskeyResult | None


@dataclass(frozen=True)
class ShortContext:
    """Base and tuned inside the native context.

    Attributes:
        window, num_windows: tokens in a window, and windows.
        base, tuned: perplexity.
        difference: mean over the windows of tuned minus base, in nats a token; below zero is better.
        standard_error: of that mean; NaN for a single window.
        verdict: ``"better"``, ``"worse"``, ``"unchanged"`` or ``"unclear"``.
    """

    window: int
    num_windows: int
    base: float
    tuned: float
    difference: float
    standard_error: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All numbers of a comparison.

    Attributes:
        run_dir, model: what was compared.
        context, native_context, window: tokens; the window is the context unless asked otherwise.
        text, held_out, seen: where the text came from; whether the run itself says that it was not trained on; else how
            many of its documents the run was trained on, None for none.
        num_documents, num_tokens: of that text, as read in long windows.
        states: base first, tuned last.
        short_context: the regression check.
        effort: as asked for.
        device: "cpu" or the accelerator's name.
        seconds: all of it.
    """

    run_dir: str
    model: str
    context: int
    native_context: int
    window: int
    text: str
    held_out: bool
    num_documents: int
    num_tokens: int
    states: tuple[State, ...]
    short_context: ShortContext
    seen: str | None = dataclasses.field(default=None, kw_only=True)
    effort: float
    device: str
    seconds: float


def compare(
    run_dir: str | Path,
    *,
    config: RunConfig | None = None,
    data: str | None = None,
    window: int | None = None,
    with_passkey: bool = True,
    trials: int | None = None,
    effort: float = 1.0,
    device: torch.device | None = None,
    checkpoint: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure base and tuned model of a run.

    Args:
        run_dir: a run with an adapter, or at least a checkpoint.
        config: the run's settings with changes; default: as they are.
        data: held-out text; default: the run's validation text, else a text that every Python carries.
        window: tokens of a long window; default: the run's context.
        with_passkey: measure retrieval too.
        trials: of each passkey cell; default: as many as the budget allows, 1 to 5.
        effort: multiplies the tokens that are read.
        device: default: a CUDA device if there is one.
        checkpoint: ``"best"``, ``"last"`` or a name; default: the best, if the run kept one.
        progress: called with the name of each part; the context manager it returns yields a function for the parts
            done and in all, or None.
    Raises: RunError: no run, or nothing saved in it. DataError: no document is as long as the window. ConfigError:
            impossible settings. ModelError: base or adapter cannot be loaded.
    """
    began, progress = time.perf_counter(), progress or _silent
    if not 0 < effort < math.inf:
        raise ConfigError(f"effort {effort}: must be above 0; 1 takes minutes on a CPU, 4 four times as long")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config or run_directory.read_config(Path(run_dir))
    adapter = run_directory.find_adapter(Path(run_dir), checkpoint)
    with progress(f"loading {config.model.name}"):
        model, tokenizer = load_base(config, device)
    native, context = native_context(model.config), config.context.context
    assert context is not None, "a run's config is resolved"
    window = context if window is None else window
    text = read_text(config, tokenizer, data)
    windows = long_windows(text.documents, window, budget=_scaled(LONG_TOKENS, device, effort))
    short = short_windows(text.documents, min(SHORT_WINDOW, native, window), _scaled(SHORT_TOKENS, device, effort))
    grid = None
    if with_passkey:
        budget = _scaled(PASSKEY_TOKENS, device, effort)
        grid = passkey_grid(window, shortest=shortest_prompt(tokenizer), budget=budget, trials=trials)

    def measure(name: str) -> State:
        return _measure(name, model, tokenizer, windows, short, window, grid, progress)

    states = [measure("base")]
    extend(model, tokenizer, config)
    if native_context(model.config) != native:
        states.append(measure("extended"))
    model = load_adapter(model, adapter)
    states.append(measure("tuned"))
    return Comparison(
        run_dir=str(run_dir),
        model=config.model.name,
        context=context,
        native_context=native,
        window=window,
        text=text.name,
        held_out=text.held_out,
        seen=text.seen,
        num_documents=len(windows),
        num_tokens=sum(len(ids) for ids in windows),
        states=tuple(states),
        short_context=short_context(states[0], states[-1]),
        effort=effort,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        seconds=time.perf_counter() - began,
    )


def _measure(
    name: str,
    model: Any,
    tokenizer: Any,
    windows: Sequence[Tensor],
    short: Sequence[Tensor],
    window: int,
    grid: dict[str, Any] | None,
    progress: Progress,
) -> State:
    with progress(f"{name}: perplexity by position, windows of {window:,}") as on_progress:
        bucket = 1 << (-(-window // BUCKETS) - 1).bit_length()  # a power of two, so that it divides native contexts
        long = perplexity(model, windows, window=window, stride=window, bucket_tokens=bucket, on_progress=on_progress)
    if name == "extended":
        return State(name, long, None, None)
    with progress(f"{name}: perplexity inside the native context") as on_progress:
        width = len(short[0])
        near = perplexity(model, short, window=width, stride=width, bucket_tokens=width, on_progress=on_progress)
    found = None
    if grid is not None:
        with progress(f"{name}: passkey retrieval") as on_progress:
            found = passkey(model, tokenizer, **grid, on_progress=on_progress)
    return State(name, long, near, found)


@contextmanager
def _silent(name: str) -> Iterator[None]:
    yield None


def _scaled(budget: dict[str, int], device: torch.device, effort: float) -> int:
    return int(budget["cpu" if device.type == "cpu" else "cuda"] * effort)


# ------------------------------------------------------------------------------------------------ text
@dataclass(frozen=True)
class Text:
    """Documents as tokens, where they came from, and whether the run says that it did not train on them."""

    documents: tuple[Tensor, ...]
    name: str
    held_out: bool
    seen: str | None = None  # how much of it the run was trained on, as its digests say


def read_text(config: RunConfig, tokenizer: Any, data: str | None) -> Text:
    """The text to measure on: what is given, else the run's own held-out text, else Python's.

    Raises: DataError: it cannot be read.
    """
    if data is not None:
        documents, name, held_out = read_path(data, config.data), data, False
    else:
        _, validation = read_data(config) if config.data.validation or config.data.validation_fraction else (None, None)
        if validation is None:
            ids = encode(tokenizer, inspect.getsource(tarfile))
            return Text((ids,), "the source code of Python's tarfile module", False)
        documents, held_out = validation, True
        share = f"{config.data.validation_fraction:.0%} of {config.data.path}"
        name = config.data.validation or share
    tokenized = tokenize(documents, tokenizer, config.data)
    rows = tuple(torch.from_numpy(found.input_ids.astype("int64")) for found in tokenized)
    return Text(rows, name, held_out, run_directory.seen_note(config.output.run_dir or "", documents))


def long_windows(documents: Sequence[Tensor], window: int, *, budget: int) -> list[Tensor]:
    """Whole windows from the begin of the documents that have one, up to the budget but at least one.

    Raises: DataError: no document is that long.
    """
    longest = max((len(ids) for ids in documents), default=0)
    if window > longest:
        raise DataError(
            f"no document long enough: the longest of {len(documents):,} has {longest:,} tokens, a window {window:,};"
            f" give longer text with --data, or measure shorter windows with --window {longest}"
        )
    left, kept = max(1, budget // window), []
    for ids in documents:
        count = min(left, len(ids) // window)
        if count:
            kept.append(ids[: count * window])
            left -= count
    return kept


def short_windows(documents: Sequence[Tensor], window: int, budget: int) -> list[Tensor]:
    """Windows of one size spread evenly over all documents, up to the budget but at least two where there are two."""
    every = [ids[start : start + window] for ids in documents for start in range(0, len(ids) - window + 1, window)]
    count = min(len(every), max(2, budget // window))
    return [every[index * len(every) // count] for index in range(count)]


def passkey_grid(window: int, *, shortest: int, budget: int, trials: int | None) -> dict[str, Any]:
    """Lengths, depths and trials: the richest grid that reads about ``budget`` tokens, or the poorest.

    What stands before a needle is read once for all trials, what follows it once for each (``passkey.py``).

    Raises: ConfigError: the window is too short for any prompt.
    """
    if window < shortest:
        raise ConfigError(f"window {window}: a passkey prompt has at least {shortest} tokens; add --no-passkey")
    for parts, depths in PASSKEY_GRIDS:
        lengths = [window // part for part in parts if window // part >= shortest]
        left = budget - max(depths) * window
        affordable = int(left / sum(length * (1 - depth) for length in lengths for depth in depths))
        if affordable >= (trials or 1):
            break
    count = trials or max(1, min(MOST_TRIALS, affordable))
    at_the_end = trials or MOST_TRIALS  # where nothing follows the needle, a trial reads no more than the question
    return {"lengths": lengths, "depths": depths, "trials": [at_the_end if d == 1 else count for d in depths]}


# ------------------------------------------------------------------------------------------------ the regression check
def short_context(base: State, tuned: State) -> ShortContext:
    """Compare two states window by window."""
    assert base.short is not None and tuned.short is not None  # noqa: PT018
    differences = [after - before for before, after in zip(base.short.by_window, tuned.short.by_window, strict=True)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return ShortContext(
        window=base.short.window,
        num_windows=len(differences),
        base=base.short.perplexity,
        tuned=tuned.short.perplexity,
        difference=mean,
        standard_error=error,
        verdict=verdict(mean, error),
    )


def verdict(difference: float, standard_error: float) -> str:
    """``"better"`` or ``"worse"`` beyond two standard errors; ``"unchanged"`` if these lie within the margin."""
    low, high = difference - 2 * standard_error, difference + 2 * standard_error
    if low >= -MARGIN_NATS and high <= MARGIN_NATS:
        return "unchanged"
    if high < 0:
        return "better"
    return "worse" if low > 0 else "unclear"
