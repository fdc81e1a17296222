"""A result appears whole or not at all: it is made under a hidden name and renamed at the end.

Whoever finds a folder (or file) of the name that was asked for has a finished result. What a killed process left behind
has a hidden name, is never read, and is cleared away by the next attempt.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longfit.errors import ExportError
from longfit.files.writing import UNFINISHED, flush_folder, flush_tree, refusals, why
from longfit.words import format_bytes

RESERVE_BYTES = 16 << 20  # tokenizer, configuration, file-system overhead


@contextmanager
def result_folder(out: Path, *, needed_bytes: int) -> Iterator[Path]:
    """Yield a hidden folder to fill; it becomes ``out`` when the block ends without an error.

    Args:
        out: must not exist yet, or be an empty folder.
        needed_bytes: of disk, checked before anything is written.
    Raises: ExportError: ``out`` exists, its place cannot be written, or the disk is (or becomes) full.
    """
    require_new(out)
    hidden = out.with_name(f".{out.name}{UNFINISHED}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(hidden, ignore_errors=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed_bytes + RESERVE_BYTES:
            raise ExportError(
                f"{out}: needs {format_bytes(needed_bytes + RESERVE_BYTES)} of disk, {format_bytes(free)} are free; "
                "give another place with --out"
            )
        hidden.mkdir()
        with refusals():
            yield hidden
        flush_tree(hidden)
        if out.exists():
            out.rmdir()
        hidden.rename(out)
        flush_folder(out.parent)
    except OSError as error:
        raise ExportError(f"{out}: cannot be written: {why(error)}; nothing was left there") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def require_new(out: Path) -> None:
    """Raise ExportError if there is something at ``out`` already."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise ExportError(f"{out}: already exists and is not overwritten; delete it or give another --out")
