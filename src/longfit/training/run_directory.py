"""The directory that is a run: what is in it, who may write into it, and whether its files are as it wrote them.

    runs/NAME/
        config.yaml         every setting, resolved
        run.json            who this run is: its id, its base model; checksums of the files beside it
        data.json           a digest of each source of documents
        documents.digests   the first bytes of the digest of each document that is trained on
        ledger.json         what became of every token
        family.json         what was understood of the model, and what that decided
        plan.json           the memory plan, and the measured peak at the end
        metrics.jsonl       one line a step
        checkpoints/        the newest few
        best/               the adapter with the lowest validation loss, if there is validation text
        samples.jsonl       what the model said while it trained, if it was asked
        trackers/           what trackers keep and say
        adapter/            the result: PEFT's files, tokenizer, configuration with the extended positions

An existing directory is never written into, except by resuming, and by one process at a time, which holds its lock.
Whether a resumed run is still the same run is in ``same_run.py``.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from longfit.config import RunConfig, load_config
from longfit.data.documents import Documents
from longfit.data.ledger import Ledger
from longfit.data.template import read_template
from longfit.errors import ConfigError, RunError
from longfit.files import checksums
from longfit.files.lock import NAME as LOCK
from longfit.files.lock import FolderLock
from longfit.files.reading import read_object, reading
from longfit.files.writing import LEFTOVERS, flush, sweep, write_text, writing
from longfit.training.checkpoint import list_checkpoints
from longfit.training.metrics import Event, OnEvent


def choose_run_dir(config: RunConfig) -> Path:
    """Return the run directory of the config, or the first free one below ``runs/``, named after model and context."""
    if config.output.run_dir is not None:
        return Path(config.output.run_dir)
    stem = Path(config.model.name).name.removesuffix(".gguf") or "model"
    number = 1
    while (path := Path("runs") / f"{stem}-{number:03d}").exists():
        number += 1
    return path


@contextmanager
def claimed(config: RunConfig, *, resume: bool, on_event: OnEvent) -> Iterator[Path]:
    """Hold the directory of a run for this process alone: a new one, or that of the run that goes on.

    What killed processes left behind in it is removed. A new directory that is still empty at the end is, too. Of
    several processes of one run the first holds it for all.

    Returns: the directory.
    Raises: RunError: it exists already (or, resuming, does not), another process has it, or it cannot be made.
    """
    if int(os.environ.get("RANK", "0")):  # of torchrun: the first process claims, and tells the others (`start.py`)
        yield choose_run_dir(config)
        return
    run_dir, lock, made = (_claim_existing if resume else _claim_new)(config)
    try:
        if lock.doubt is not None:
            on_event(Event("warning", lock.doubt))
        for folder in (run_dir, run_dir / "checkpoints"):
            sweep(folder)
        yield run_dir
    finally:
        lock.release()
        for folder in made:
            with suppress(OSError):  # it is not empty: the run is in it
                folder.rmdir()


def _claim_existing(config: RunConfig) -> tuple[Path, FolderLock, list[Path]]:
    run_dir = choose_run_dir(config)
    with writing(run_dir):
        return run_dir, FolderLock(run_dir).take(), []


def _claim_new(config: RunConfig) -> tuple[Path, FolderLock, list[Path]]:
    """Make and lock a directory; of two processes that choose a name at once, the second takes the next one."""
    while True:
        run_dir = choose_run_dir(config)
        if run_dir.exists() and not run_dir.is_dir():
            raise RunError(f"{run_dir}: is a file; choose another --run-dir")
        missing = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        try:
            with writing(run_dir):
                run_dir.mkdir(parents=True, exist_ok=config.output.run_dir is not None)
                lock = FolderLock(run_dir).take()
        except RunError as error:
            if isinstance(error.__cause__, FileExistsError) and config.output.run_dir is None:
                continue
            raise
        try:
            require_new(run_dir)
        except RunError:
            lock.release()
            raise
        for name in BEGUN:
            (run_dir / name).unlink(missing_ok=True)
        return run_dir, lock, missing


BEGUN = frozenset({"documents.digests", "ledger.json", "data.json", "run.json"})
"""What is written before ``config.yaml``: a directory with nothing else is a start that was cut off."""


def require_new(run_dir: Path) -> None:
    """Raise RunError if there is something in the directory that a start which was cut off has not left behind."""
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise RunError(f"{run_dir}: is a file; choose another --run-dir")
    found = {path.name for path in run_dir.iterdir()} - {LOCK}
    if all(name in BEGUN or name.endswith(LEFTOVERS) for name in found):
        return
    goes_on = f"longfit train --run-dir {run_dir} --resume continues it; or " if "config.yaml" in found else ""
    raise RunError(f"{run_dir}: already exists and is not overwritten; {goes_on}choose another --run-dir")


def read_config(run_dir: Path) -> RunConfig:
    """Read the settings of an existing run.

    Raises: RunError: there is no run in this directory. ConfigError: its settings are damaged.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        if not run_dir.exists():
            raise RunError(f"{run_dir}: no run to read: the directory is not there; longfit runs lists those there are")
        begun = run_dir.is_dir() and any((run_dir / name).exists() for name in BEGUN)
        cut_off = "; its start was cut off; longfit train starts it again" if begun else ""
        raise RunError(f"{run_dir}: no run to read: the directory holds no config.yaml{cut_off}")
    with reading(path, "the settings of the run", ConfigError, do="put back what the run wrote"):
        return load_config(path, flags={"--run-dir": ("output.run_dir", str(run_dir))})


def last_checkpoint(run_dir: Path) -> Path:
    """Return the newest complete checkpoint.

    Raises: RunError: there is none.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise RunError(f"{run_dir}: nothing was saved yet; longfit train --run-dir {run_dir} --resume goes on with it")
    return checkpoints[-1]


def find_adapter(run_dir: Path, checkpoint: str | None = None) -> Path:
    """Return the adapter that stands for a run.

    Args:
        run_dir: of the run.
        checkpoint: ``"best"`` (by validation loss), ``"last"``, or the name of a folder below ``checkpoints/``; None
            for the best, or the last where none was kept.
    Raises: RunError: nothing is saved there yet, or there is no such checkpoint.
    """
    if checkpoint in (None, "best") and (run_dir / "best").is_dir():
        return run_dir / "best"
    if checkpoint in (None, "last") and (run_dir / "adapter").is_dir():
        return run_dir / "adapter"
    checkpoints = {folder.name: folder for folder in list_checkpoints(run_dir)}
    if not checkpoints:
        raise RunError(
            f"{run_dir}: no adapter and no checkpoint yet; finish the run with longfit train --resume --run-dir"
            f" {run_dir}, or give its directory again"
        )
    if checkpoint is None or checkpoint == "last":
        return list(checkpoints.values())[-1] / "adapter"
    if checkpoint not in checkpoints:
        names = [*(["best"] if (run_dir / "best").is_dir() else []), "last", *checkpoints]
        raise RunError(f"{run_dir}: no checkpoint {checkpoint!r}; there are {', '.join(names)}")
    return checkpoints[checkpoint] / "adapter"


def _absolute(path: Path) -> str:
    """A path from the root, links followed, unless they lead in a circle or to a device, which is named as it was."""
    return str(path.resolve()) if path.is_file() or path.is_dir() else os.path.abspath(path)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Make the paths in a config independent of the current directory; hub ids and missing data stay as they are."""
    flat = config.flat()
    may_be_hub_ids = ("model.name", "data.path", "data.validation", "adapter.init", "train.samples_document")
    always_paths = ("optim.file", "engine.offload_folder", "engine.stream_folder")
    paths = {key: flat[key] for key in (*may_be_hub_ids, *always_paths) if flat[key] is not None}
    changed = {key: _absolute(Path(path)) for key, path in paths.items() if key in always_paths or Path(path).exists()}
    template = config.data.chat_template
    if template is not None and template != "chatml" and "{" not in template and Path(template).is_file():
        text = read_template(template)  # the run keeps the template itself: a file may change
        config = config.replace({"data.chat_template": text}, origin=config.origin("data.chat_template"))
    absolute = config
    for key, path in changed.items():
        if path != paths[key]:
            absolute = absolute.replace({key: path}, origin=config.origin(key))
    return absolute


SEEN_BYTES = 8  # of a document's digest: two of a million documents share it by chance once in 37 million sets


def seen_note(run_dir: str | Path, documents: Documents) -> str | None:
    """Say how many of these documents a run was trained on, whole and unchanged; None if none, or not a run."""
    path = Path(run_dir) / "documents.digests"
    if not path.is_file():
        return None
    seen = np.fromfile(path, dtype=np.uint8).reshape(-1, SEEN_BYTES)
    count = int(np.isin(_as_numbers(documents.digests), _as_numbers(seen)).sum())
    return f"{count:,} of {len(documents):,} documents are among those that this run was trained on" if count else None


def _as_numbers(digests: np.ndarray) -> np.ndarray:
    """The first bytes of digests, uint8 ``[N, >= 8]``, as uint64 ``[N]``."""
    return np.ascontiguousarray(digests[:, :SEEN_BYTES]).view(np.uint64)[:, 0]


UNSAFE = "without it the run cannot be resumed safely: start a new one in another --run-dir"
IDENTITY_FORMAT = 1


@dataclass(frozen=True)
class Identity:
    """Who a run is, from its first moment on.

    Attributes:
        run_id: the same in all its checkpoints, and in its file of paged optimiser state.
        num_processes: windows trained at once; they decide the windows of a step.
        model: fingerprints of the files of its base model, by name; empty where they are not on this machine's disk.
    """

    run_id: str
    num_processes: int
    model: Mapping[str, str] = field(default_factory=dict)


def new_run_id() -> str:
    """Return a name that no other run has."""
    return os.urandom(8).hex()


def create(
    run_dir: Path,
    config: RunConfig,
    *,
    identity: Identity,
    digest: dict[str, dict[str, str]],
    ledger: Ledger,
    training: Documents,
) -> None:
    """Write what is known before the first step into the directory of a new run.

    Raises: RunError: it cannot be written.
    """
    texts = {
        "ledger.json": ledger.to_json(),
        "data.json": json.dumps(digest, indent=1) + "\n",
        # Its own place is not written: a run may be moved.
        "config.yaml": config.replace({"output.run_dir": None}).to_yaml(),
    }
    seen = run_dir / "documents.digests"
    # tofile loses the error of a full disk
    with writing(seen, then="nothing was trained yet"), seen.open("wb") as file:
        file.write(_as_numbers(training.digests).tobytes())
        file.flush()
        flush(file.fileno())
    files = {name: checksums.text_digest(text) for name, text in texts.items()}
    files[seen.name] = checksums.file_digest(seen)
    run = checksums.sealed({"format": IDENTITY_FORMAT, **asdict(identity), "files": files})
    for name in ("ledger.json", "data.json", "run.json", "config.yaml"):  # the last makes the directory a run
        with writing(run_dir / name, then="nothing was trained yet"):
            write_text(run_dir / name, run if name == "run.json" else texts[name])


def write_plan(run_dir: Path, text: str) -> None:
    """Write ``plan.json``. Raises: RunError: it cannot be written."""
    _write_note(run_dir / "plan.json", text)


def write_family(run_dir: Path, text: str) -> None:
    """Write ``family.json``. Raises: RunError: it cannot be written."""
    _write_note(run_dir / "family.json", text)


def _write_note(path: Path, text: str) -> None:
    with writing(path, then="the run itself is not touched"):
        write_text(path, text)


def require_own_files(run_dir: Path) -> Identity:
    """Check that the files which a run wrote when it began are as they were.

    Returns: who the run is.
    Raises: RunError: a file is missing, damaged or was changed.
    """
    path = run_dir / "run.json"
    values = read_object(path, RunError, what="the identity of the run", do=UNSAFE)
    if not checksums.is_whole(values) or values.get("format") != IDENTITY_FORMAT:
        raise RunError(f"{path}: is damaged, or of another version of longfit; {UNSAFE}")
    found = checksums.damage(run_dir, values["files"])
    if found:
        raise RunError(
            f"cannot resume {run_dir}: {'; '.join(found)}. Put back what the run wrote (settings are changed on the "
            "command line), or start a new run in another --run-dir"
        )
    return Identity(values["run_id"], values["num_processes"], values["model"])
