"""Which evaluation of a run was the best, and whether there is still any point in going on.

Both follow from ``metrics.jsonl`` alone, so a resumed run knows what an unbroken one knows. A run that trains on and on
over little text lowers its training loss and raises its validation loss; the adapter of its best evaluation is kept in
``best/``, beside the newest checkpoints, and is what the run stands for.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from longfit.errors import ConfigError, RunError
from longfit.files.checksums import seal_folder
from longfit.files.reading import read_object, reading
from longfit.files.writing import replace_folder
from longfit.model.save import save_adapter
from longfit.planning.disk_bytes import adapter_bytes
from longfit.training.checkpoint import num_bytes, require_free, saving, trained_tensors


@dataclass(frozen=True)
class Best:
    """The evaluation with the lowest validation loss; of equal ones the first."""

    step: int
    eval_loss: float


def best_of(records: Sequence[dict[str, object]]) -> Best | None:
    """The best evaluation among the lines of ``metrics.jsonl``."""
    found = [Best(int(str(r["step"])), float(str(r["eval_loss"]))) for r in records if "eval_loss" in r]
    found = [evaluation for evaluation in found if math.isfinite(evaluation.eval_loss)]
    return min(found, key=lambda evaluation: evaluation.eval_loss, default=None)


def evaluations_since_best(records: Sequence[dict[str, object]]) -> int:
    """How many evaluations in a row have not been better than the best before them."""
    best, steps = best_of(records), [int(str(r["step"])) for r in records if "eval_loss" in r]
    return len(steps) if best is None else len([step for step in steps if step > best.step])


def reason_to_stop(records: Sequence[dict[str, object]], patience: int | None) -> str | None:
    """Why a run ends early; None if it goes on."""
    best = best_of(records)
    if patience is None or best is None or evaluations_since_best(records) < patience:
        return None
    times = "once" if patience == 1 else f"{patience} times in a row"
    return f"the validation loss has not fallen {times} since step {best.step} ({best.eval_loss:.4f}): train.patience"


def require_validation(*, keep_best: bool, patience: int | None, has_validation: bool) -> None:
    """Raise ConfigError if something waits for a validation loss that is never measured."""
    if patience is not None and not has_validation:
        raise ConfigError(
            "train.patience acts on the validation loss, and there is no validation text: add data.validation=FILE or"
            " data.validation_fraction=0.05"
        )


def save_best(
    run_dir: Path, best: Best, *, model: Any, tokenizer: Any, trained: dict[str, Tensor] | None = None
) -> None:
    """Put the adapter as it is now in the place of the best one; ``trained`` holds the tensors of a sharded model."""

    def write(folder: Path) -> None:
        save_adapter(model, tokenizer, folder, trained=trained)
        (folder / "best.json").write_text(json.dumps(asdict(best)) + "\n", encoding="utf-8")
        seal_folder(folder)

    needed = adapter_bytes(num_bytes(trained or trained_tensors(model)))
    with saving(run_dir, run_dir / "best", needed):
        require_free(run_dir, needed)
        replace_folder(run_dir / "best", write)


def read_best(run_dir: Path) -> Best | None:
    """What ``best/`` of a run holds."""
    path = run_dir / "best" / "best.json"
    if not path.is_file():
        return None
    with reading(path, "the best evaluation", RunError, do="resume the run, or delete the folder it is in"):
        return Best(**read_object(path, RunError, what="the best evaluation"))
