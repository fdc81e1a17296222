"""A dry run: everything that a run does before its first step, and nothing left behind."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from longfit.config import RunConfig
from longfit.training import run_directory
from longfit.training.metrics import OnEvent, ignore
from longfit.training.start import start


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do.

    Attributes:
        run_dir: where it would write.
        num_windows, total_steps: of its whole length.
        num_parameters: that would be trained.
    """

    run_dir: Path
    num_windows: int
    total_steps: int
    num_parameters: int


def rehearse(config: RunConfig, *, on_event: OnEvent | None = None) -> Rehearsal:
    """Do everything that a run does before its first step, and leave nothing behind.

    Raises: what `train` raises before it writes.
    """
    run_dir = run_directory.choose_run_dir(config)
    run_directory.require_new(run_dir)
    config = run_directory.with_absolute_paths(config)
    with tempfile.TemporaryDirectory(prefix="longfit-dry-run-") as folder:
        if config.optim.file is not None:
            config = config.replace({"optim.file": str(Path(folder) / "optim")}, origin="dry run")
        (Path(folder) / "run").mkdir()
        run = start(config, Path(folder) / "run", on_event or ignore, resume=False)
        if run.heartbeat is not None:
            run.heartbeat.stop()
        num_parameters = sum(parameter.numel() for parameter in run.parameters)
        return Rehearsal(run_dir, len(run.windows), run.total_steps, num_parameters)
