"""What to change when a run does not fit, cheapest first: what each change frees, what it costs, and how to say it.

A ladder is climbed only as far as needed. Each suggestion is a change of settings on top of those before it, made only
if it relieves a place that holds too much. First come changes that leave every number of the run as it is (where things
wait, how many tokens at once), then those that change rounding, then those that change what is learned.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from longfit.planning.memory import PLACES, MemoryPlan, memory_plan
from longfit.planning.settings import PlanSettings
from longfit.planning.shapes import ModelShape

SMALLEST_TILE = 128
PAGE_BUDGET_BYTES = 64 << 20
CONTEXT_STEP = 1024

KEYS = {
    **{"tile": "engine.tile", "offload": "engine.offload", "stream": "engine.stream", "optim": "optim.optim"},
    **{"saved_attention": "engine.saved_attention", "saved_products": "engine.saved_products"},
    **{"budget": "optim.budget", "file": "optim.file"},
    **{"attention": "context.attention", "train_embeddings": "adapter.train_embeddings", "rank": "adapter.rank"},
    **{
        "quant": "model.quant",
        "batch_size": "train.batch_size",
        "gradient_accumulation": "train.gradient_accumulation",
    },
    **{"context": "context.context", "shard": "parallel.shard", "sequence": "parallel.sequence"},
}
"""A plan's settings under the names that a command or a config file knows."""


@dataclass(frozen=True)
class Suggestion:
    """One change.

    Attributes:
        name: for people.
        changes: settings to change.
        paste: the same as ``section.key=value`` words.
        frees: bytes less at each place's peak (negative: more).
        costs: what it costs.
        exact: whether the run computes the same numbers.
        fits: whether the run fits with this suggestion and those before it.
    """

    name: str
    changes: Mapping[str, Any]
    paste: str
    frees: Mapping[str, int]
    costs: str
    exact: bool
    fits: bool


@dataclass(frozen=True)
class _Lever:
    name: str
    costs: str
    exact: bool
    options: Callable[[PlanSettings, ModelShape], Iterator[dict[str, Any]]]  # in the order in which to try them
    silent: bool = False  # a run may take it without asking: same numbers, no disk, and it can be taken in mid-run


def _one(condition: Callable[[PlanSettings], bool], **changes: Any) -> Callable[..., Iterator[dict[str, Any]]]:
    def options(settings: PlanSettings, shape: ModelShape) -> Iterator[dict[str, Any]]:
        if condition(settings):
            yield changes

    return options


def _tiles(settings: PlanSettings, shape: ModelShape) -> Iterator[dict[str, Any]]:
    tile = settings.tile_tokens(shape)
    while tile // 2 >= SMALLEST_TILE:
        tile //= 2
        yield {"tile": tile}


def _ranks(settings: PlanSettings, shape: ModelShape) -> Iterator[dict[str, Any]]:
    rank = settings.rank
    while rank // 2 >= 8:
        rank //= 2
        yield {"rank": rank}


def _batches(settings: PlanSettings, shape: ModelShape) -> Iterator[dict[str, Any]]:
    if settings.batch_size > 1:
        yield {"batch_size": 1, "gradient_accumulation": settings.gradient_accumulation * settings.batch_size}


def _on_card(settings: PlanSettings) -> bool:
    return settings.device == "cuda"


def _may_shard(settings: PlanSettings) -> bool:
    """Whether devices may come to share the weights (``training/distribute.py:require_shardable``)."""
    several = settings.processes > 1 and settings.shard == 1
    return several and settings.stream == "none" and settings.optim == "adamw" and not settings.file


def _may_page(settings: PlanSettings) -> bool:
    """Whether optimiser state may be paged: on a CPU to a file, which does not go with shards."""
    return settings.budget is None and not (settings.device == "cpu" and settings.shard > 1)


def _sharing(settings: PlanSettings) -> dict[str, Any]:
    """One window over all devices, with as many windows a step as before."""
    passes = settings.gradient_accumulation * settings.processes
    return {"sequence": settings.processes, "gradient_accumulation": passes}


LEVERS = (
    _Lever(
        "layer inputs wait in host memory",
        "host memory; the copies hide behind computing above some thousand tokens",
        True,
        _one(lambda s: _on_card(s) and s.offload == "device", offload="ram"),
        silent=True,
    ),
    _Lever(
        "linear layers are computed again, not saved",
        "up to a fourth of a step",
        True,
        _one(lambda s: s.saved_products != 0, saved_products=0),
        silent=True,
    ),
    _Lever("one window at a time, as many a step", "nothing but launches", True, _batches),
    _Lever("smaller tiles", "some per cent of speed for each halving", True, _tiles, silent=True),
    _Lever(
        "attention is computed again, not saved",
        "a third forward pass of attention",
        True,
        lambda s, shape: iter([{"saved_attention": 0}] if s.saved_attention != 0 and s.device == "cpu" else []),
        silent=True,
    ),
    _Lever(
        "weights, gradients and optimiser state in shards",
        "each layer is gathered once in each direction",
        True,
        lambda s, shape: iter([{"shard": s.processes}] if _may_shard(s) else []),
    ),
    _Lever(
        "one window over all devices",
        "keys travel; a step has fewer windows at once, and as many passes more",
        True,
        lambda s, shape: iter([_sharing(s)] if s.processes > 1 and s.sequence == 1 else []),
    ),
    _Lever(
        "paged optimiser state",
        "each step moves it once in and once out",
        True,
        lambda s, shape: iter([{"budget": PAGE_BUDGET_BYTES, "file": s.device == "cpu"}] if _may_page(s) else []),
    ),
    _Lever(
        "layer inputs wait in a file",
        "the disk must take and give all of them every step",
        True,
        _one(lambda s: s.offload != "file", offload="file"),
    ),
    _Lever(
        "weights are streamed from host memory",
        "copies hide behind computing above some thousand tokens; no validation meanwhile",
        True,
        _one(lambda s: _on_card(s) and s.stream == "none" and s.shard == 1, stream="ram"),
    ),
    _Lever(
        "weights are streamed from a file",
        "the disk must give all of them twice every step",
        True,
        _one(lambda s: s.stream != "file" and s.shard == 1, stream="file"),
    ),
    _Lever(
        "8-bit optimiser state",
        "moments rounded block by block",
        False,
        _one(lambda s: s.optim == "adamw" and s.shard == 1, optim="adamw8bit"),
    ),
    _Lever("4-bit base", "quantisation error of NF4 (QLoRA)", False, _one(lambda s: s.quant == "none", quant="nf4")),
    _Lever(
        "shifted attention",
        "training attends within groups of a quarter of the context (LongLoRA); also quicker",
        False,
        _one(lambda s: s.attention == "exact", attention="shifted"),
    ),
    _Lever(
        "frozen embeddings",
        "LongLoRA's extra trainable part; perplexity at long contexts suffers",
        False,
        _one(lambda s: s.train_embeddings, train_embeddings=False),
    ),
    _Lever("smaller rank", "less capacity of the adapters", False, _ranks),
)


def excess(memory: MemoryPlan, limits: Mapping[str, int]) -> dict[str, int]:
    """Bytes beyond the limit at each place that holds too much."""
    over = {place: memory.peak(place) - limit for place, limit in limits.items()}
    return {place: amount for place, amount in over.items() if amount > 0}


def climb(
    shape: ModelShape,
    settings: PlanSettings,
    limits: Mapping[str, int],
    *,
    fixed: frozenset[str] = frozenset(),
    silent: bool = False,
) -> tuple[list[Suggestion], PlanSettings]:
    """Climb the ladder until the run fits or no suggestion is left.

    Args:
        limits: bytes at "accelerator", "host" and "disk"; a place that is missing is not limited.
        fixed: settings that must stay.
        silent: use only suggestions that nobody needs to be asked about.
    Returns: the suggestions, cheapest first, the last of which fits if any does; the settings with all of them.
    """
    suggestions: list[Suggestion] = []
    for lever in LEVERS:
        if silent and not lever.silent:
            continue
        best: tuple[PlanSettings, dict[str, Any]] | None = None
        for changes in lever.options(settings, shape):
            over = excess(memory_plan(shape, settings), limits)
            if not over:
                return suggestions, settings
            if fixed & changes.keys():
                break
            before = memory_plan(shape, best[0] if best else settings)
            after = memory_plan(shape, settings.changed(changes))
            if not _relieves(before, after, over, limits):
                continue
            best = settings.changed(changes), changes
            if not excess(after, limits):
                break
        if best is not None:
            suggestions.append(_suggestion(lever, best[1], shape, settings, best[0], limits))
            settings = best[0]
    return suggestions, settings


def step_down(shape: ModelShape, settings: PlanSettings, place: str) -> Suggestion | None:
    """Return the silent change that frees most of a place, as after running out of memory there; None if none does."""
    before = memory_plan(shape, settings).peak(place)
    suggestions = []
    for lever in LEVERS:
        changes = next(lever.options(settings, shape), None) if lever.silent else None
        if changes is not None:
            after = settings.changed(changes)
            suggestions.append(_suggestion(lever, changes, shape, settings, after, {place: before - 1}))
    return max(
        (suggestion for suggestion in suggestions if suggestion.fits),
        key=lambda suggestion: suggestion.frees[place],
        default=None,
    )


def _relieves(before: MemoryPlan, after: MemoryPlan, over: Mapping[str, int], limits: Mapping[str, int]) -> bool:
    """Whether a place that holds too much holds at least 1 % less, and no place newly holds too much."""
    relieved = any(after.peak(place) < 0.99 * before.peak(place) for place in over)
    newly = excess(after, limits).keys() - over.keys()
    return relieved and not newly


def _suggestion(
    lever: _Lever,
    changes: Mapping[str, Any],
    shape: ModelShape,
    before: PlanSettings,
    after: PlanSettings,
    limits: Mapping[str, int],
) -> Suggestion:
    old, new = memory_plan(shape, before), memory_plan(shape, after)
    frees = {place: old.peak(place) - new.peak(place) for place in PLACES if old.peak(place) != new.peak(place)}
    return Suggestion(lever.name, changes, paste(changes), frees, lever.costs, lever.exact, not excess(new, limits))


def paste(changes: Mapping[str, Any]) -> str:
    """Say changed settings as a command takes them."""
    words = []
    for name, value in changes.items():
        if name == "file":
            if value:
                words.append(f"{KEYS[name]}=optimizer.pages")
        else:
            words.append(f"{KEYS[name]}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(words)


def longest_context(
    shape: ModelShape, settings: PlanSettings, limits: Mapping[str, int], *, most: int = 1 << 24
) -> int:
    """The longest context that fits, in steps of 1,024 tokens; 0 if not even the first does.

    Args:
        most: tokens at which to stop looking.
    """
    low, high = 0, most // CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        tried = memory_plan(shape, settings.changed({"context": middle * CONTEXT_STEP}))
        low, high = (middle, high) if not excess(tried, limits) else (low, middle - 1)
    return low * CONTEXT_STEP
