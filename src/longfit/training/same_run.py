"""Whether a run that goes on is still the same run: its settings, its data and its base model.

Where one of them changed, resuming is refused, because the losses would silently be those of another run.
"""

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from longfit.config import RunConfig
from longfit.data.documents import Documents
from longfit.data.sources import FileSource
from longfit.errors import RunError
from longfit.files.reading import read_object
from longfit.training.run_directory import UNSAFE

# Settings that do not change what is learned, so a resumed run may change them.
FREE_SETTINGS = frozenset(
    {
        "output.run_dir",
        "train.save_every",
        "train.keep_checkpoints",
        "train.eval_every",
        "train.keep_best",
        "train.patience",
        "train.samples",
        "train.samples_document",
        "train.samples_every",
        "train.samples_tokens",
        "output.track",
        "data.validation_windows",
        "data.cache",
        "data.cache_limit",
        "optim.budget",
        "optim.file",
        "engine.offload",
        "engine.offload_folder",
        "engine.stream",
        "engine.stream_folder",
        "parallel.devices",
        "parallel.timeout",
    }
)
# These change rounding, but not what is computed: a smaller tile after running out of memory, another device.
ROUNDING_SETTINGS = frozenset(
    {"engine.engine", "engine.tile", "model.device", "parallel.data", "parallel.sequence", "parallel.shard"}
)


def merge_for_resume(stored: RunConfig, asked: RunConfig) -> tuple[RunConfig, list[str]]:
    """Take a run's stored settings, with those changes that leave it the same run.

    Args:
        stored: from `read_config`.
        asked: what the user gave now; only explicitly given settings count.
    Returns: the config to resume with; a warning for each change that alters rounding.
    Raises: RunError: other settings changed; all of them are named.
    """
    before, now = stored.flat(), asked.flat()
    ignored = {"train.epochs"}  # resolved into steps, which are compared
    changed = {
        key: value
        for key in asked.given()
        if key not in ignored and (value := now[key]) is not None and value != before[key]
    }
    refused = changed.keys() - FREE_SETTINGS - ROUNDING_SETTINGS
    if refused:
        lines = [f"  {key}: the run has {before[key]}, now {changed[key]}" for key in sorted(refused)]
        advice = "drop the change to resume, or start a new run in another --run-dir"
        raise RunError("\n".join([f"cannot resume, settings changed ({advice}):", *lines]))
    warnings = [
        f"{key} changed from {before[key]} to {changed[key]}: losses may differ from an unbroken run in rounding"
        for key in sorted(changed.keys() & ROUNDING_SETTINGS)
    ]
    return stored.replace(changed, origin="resume"), warnings


def data_digest(**parts: Documents | None) -> dict[str, dict[str, str]]:
    """Digest the documents of each source, so that a change can be named.

    Args: parts: ``training=...``, ``validation=...``; None for no documents.
    Returns: ``{part: {source: hex digest}}``.
    """
    digests: dict[str, dict[str, str]] = {}
    for part, documents in parts.items():
        hashes: dict[str, Any] = {}
        if documents is None:
            digests[part] = {}
            continue
        for index in np.unique(documents.source).tolist():
            source = documents.sources[index]
            name = source.name if isinstance(source, FileSource) else "memory"
            of_source = np.ascontiguousarray(documents.digests[documents.source == index])
            hashes.setdefault(name, blake2b(digest_size=16)).update(of_source.tobytes())
        digests[part] = {name: state.hexdigest() for name, state in hashes.items()}
    return digests


def require_same_data(run_dir: Path, digest: dict[str, dict[str, str]]) -> None:
    """Raise RunError naming the sources that changed since the run began."""
    before = read_object(run_dir / "data.json", RunError, what="the digest of the data", do=UNSAFE)
    lines = []
    for part, now in digest.items():
        then = dict(before.get(part) or {})
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                what = "new" if name not in then else "missing" if name not in now else "changed"
                lines.append(f"  {name}: {what} ({part})")
    if lines:
        shown = lines[:5] + [f"  ... and {len(lines) - 5:,} more"] * (len(lines) > 5)
        advice = "restore it to resume, or start a new run in another --run-dir"
        raise RunError("\n".join([f"cannot resume {run_dir}, the data changed ({advice}):", *shown]))


def require_same_model(run_dir: Path, before: Mapping[str, str], model: Mapping[str, str]) -> None:
    """Raise RunError naming the file of the base model that changed since the run began.

    Args:
        before, model: fingerprints of its files then and now.
    """
    changed = sorted(name for name in before.keys() & model.keys() if before[name] != model[name])
    if changed or (before and model and before.keys() != model.keys()):
        name = (changed or sorted(before.keys() ^ model.keys()))[0]
        raise RunError(
            f"cannot resume {run_dir}: the base model changed ({name}); put back the one the run began with, or start "
            "a new run in another --run-dir"
        )
