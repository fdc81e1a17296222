"""What reading a large path once told, on disk: a later start knows its documents without reading them.

An entry is named after every file's path, size and times and the settings that it was read with; a file that is written
to has other times (``ctime`` cannot be set), so the entry is not found. Files that changed within the last seconds are
not trusted to: the clock of some file systems is as coarse as that.

What this is not: the documents. They are read again where they are iterated, and each is compared with its digest.
"""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from longfit.data.extraction import Extraction
from longfit.data.source_report import SourceReport
from longfit.errors import DataError
from longfit.files.reading import reading, require_regular

FORMAT = 2  # of an entry, and of what reading makes of a file: raise it when either changes
SETTLED_SECONDS = 3.0  # FAT and some network file systems count in two seconds

Survey = tuple[dict[str, np.ndarray], SourceReport, bool]  # arrays by name; what was found; whether they are chats


def survey_key(files: Iterable[Path], **settings: object) -> str | None:
    """Name the entry of some files as they are now; None if one of them changed just now."""
    digest = blake2b(json.dumps([FORMAT, settings], sort_keys=True, default=str).encode(), digest_size=16)
    latest = 0
    for file in files:
        stat = file.stat()
        latest = max(latest, stat.st_mtime_ns, stat.st_ctime_ns)
        place = os.fsencode(file.resolve())
        digest.update(b"%d %d %d %d %s\0" % (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, place))
    return digest.hexdigest() if latest / 1e9 < time.time() - SETTLED_SECONDS else None


def read_survey(place: Path) -> Survey | None:
    """Read an entry; None if it is not there, or not whole."""
    try:
        with reading(place, "what is cached", DataError):
            require_regular(place, DataError)
            with np.load(place, allow_pickle=False) as table:
                arrays = {name: table[name] for name in table.files}
            said = json.loads(arrays.pop("said").tobytes())
            report: dict[str, Any] = {key: _as_tuples(value) for key, value in said["report"].items()}
            report["extractions"] = tuple(
                (name, Extraction(*_as_tuples(found))) for name, found in report["extractions"]
            )
            return arrays, SourceReport(**report), bool(said["is_chat"])
    except DataError:  # it is read anew
        return None


def write_survey(place: Path, survey: Survey) -> None:
    """Write an entry beside its place, and rename it when it is whole. A cache that cannot be written is no error."""
    arrays, report, is_chat = survey
    values = {**asdict(report), "extractions": [[n, list(asdict(found).values())] for n, found in report.extractions]}
    said = json.dumps({"report": values, "is_chat": is_chat}).encode()
    unfinished = place.with_name(f".{place.name}.{os.getpid()}.unfinished")
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.savez(file, **{**arrays, "said": np.frombuffer(said, dtype=np.uint8)})  # type: ignore[arg-type]
        unfinished.replace(place)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
