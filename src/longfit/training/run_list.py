"""The runs of a directory, a line each; one whose files are damaged says so, and hides no other."""

from dataclasses import dataclass
from pathlib import Path

from longfit.errors import LongfitError, RunError
from longfit.files.reading import reading
from longfit.training.metrics import read_metrics
from longfit.training.run_directory import read_config


@dataclass(frozen=True)
class RunSummary:
    """One line of a list of runs."""

    run_dir: Path
    model: str
    data: str
    context: int | None
    step: int
    total_steps: int | None
    loss: float | None
    eval_loss: float | None
    finished: bool
    changed_at: float
    problem: str | None = None  # why its files cannot be read; then the numbers are missing


def list_runs(directory: Path) -> list[RunSummary]:
    """Summarise the runs directly below a directory, the latest changed first; a damaged one says what is wrong."""
    found = [_summarise(path.parent) for path in directory.glob("*/config.yaml")]
    return sorted(found, key=lambda run: run.changed_at, reverse=True)


def _summarise(run_dir: Path) -> RunSummary:
    try:
        with reading(run_dir, "the run", RunError, do="look at its files"):
            return _read_summary(run_dir)
    except LongfitError as error:
        changed_at = run_dir.stat().st_mtime
        return RunSummary(run_dir, "?", "?", None, 0, None, None, None, False, changed_at, " ".join(str(error).split()))


def _read_summary(run_dir: Path) -> RunSummary:
    config, metrics = read_config(run_dir), run_dir / "metrics.jsonl"
    records = read_metrics(metrics)
    steps = [record for record in records if "loss" in record]
    evals = [record for record in records if "eval_loss" in record]
    return RunSummary(
        run_dir=run_dir,
        model=config.model.name,
        data=config.data.path,
        context=config.context.context,
        step=int(str(steps[-1]["step"])) if steps else 0,
        total_steps=config.train.steps,
        loss=float(str(steps[-1]["loss"])) if steps else None,
        eval_loss=float(str(evals[-1]["eval_loss"])) if evals else None,
        finished=(run_dir / "adapter").is_dir(),
        changed_at=(metrics if metrics.exists() else run_dir).stat().st_mtime,
    )
