"""What differs between two runs: settings, data, and what came out of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longfit.errors import RunError
from longfit.files.reading import read_object
from longfit.training.metrics import read_metrics
from longfit.training.run_directory import read_config


@dataclass(frozen=True)
class Difference:
    """One thing that differs, by its name: a dotted setting, "data", or a result."""

    name: str
    first: object
    second: object


@dataclass(frozen=True)
class RunDiff:
    """Two runs beside each other.

    Attributes:
        settings: those that differ, in the order of the config; where a run lies is none.
        same_data: whether both read the same documents; None where a run does not say.
        results: losses, speed and memory, whether they differ or not.
    """

    settings: tuple[Difference, ...]
    same_data: bool | None
    results: tuple[Difference, ...]


def diff_runs(first: str | Path, second: str | Path) -> RunDiff:
    """Compare two run directories.

    Raises: RunError: one of them is no run.
    """
    one, two = Path(first), Path(second)
    left, right = read_config(one).flat(), read_config(two).flat()
    settings = tuple(
        Difference(key, left.get(key), right.get(key))
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key) and key != "output.run_dir"
    )
    digests = [_digest(run) for run in (one, two)]
    same = None if None in digests else digests[0] == digests[1]
    found = [_results(run) for run in (one, two)]
    names = dict.fromkeys([*found[0], *found[1]])
    return RunDiff(settings, same, tuple(Difference(name, found[0].get(name), found[1].get(name)) for name in names))


def _digest(run_dir: Path) -> Any:
    path = run_dir / "data.json"
    return read_object(path, RunError, what="the digest of the data") if path.is_file() else None


def _results(run_dir: Path) -> dict[str, object]:
    records = read_metrics(run_dir / "metrics.jsonl")
    steps: list[dict[str, Any]] = [dict(record) for record in records if "loss" in record]
    evaluated: list[dict[str, Any]] = [dict(record) for record in records if "eval_loss" in record]
    results: dict[str, object] = {"steps": len(steps)}
    if steps:
        tokens, seconds = sum(step["tokens"] for step in steps), sum(step["step_s"] for step in steps)
        results |= {
            "first loss": steps[0]["loss"],
            "last loss": steps[-1]["loss"],
            "tokens": tokens,
            "tokens/s": tokens / seconds,
            "peak memory, bytes": max(step["peak_memory_bytes"] for step in steps),
        }
    if evaluated:
        best = min(evaluated, key=lambda record: float(record["eval_loss"]))
        results |= {
            "last validation loss": evaluated[-1]["eval_loss"],
            "best validation loss": best["eval_loss"],
            "at step": best["step"],
        }
    return results
