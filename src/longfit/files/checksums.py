"""Checksums of what a run will read again: a flipped bit shows, instead of becoming another result.

They find damage (a failing disk, a broken copy), they are no protection against somebody who means harm.
"""

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20
NAME = "checksums.json"  # of a sealed folder


def file_digest(path: Path) -> str:
    """Return 16 bytes of BLAKE2b of a file's content, in hexadecimal."""
    state = blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def text_digest(text: str) -> str:
    """Return what `file_digest` returns for a UTF-8 file of this text."""
    return blake2b(text.encode(), digest_size=16).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder, by its path relative to it, with ``/`` between parts."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def damage(folder: Path, expected: Mapping[str, str], names: Iterable[str] | None = None) -> list[str]:
    """Say what is wrong with the files of a folder.

    Args:
        folder: where they are.
        expected: what `digests` once returned.
        names: of those to look at; None: all.
    Returns: a line for each file that is missing, unreadable or changed; none if all is as it was.
    """
    lines = []
    for name in expected if names is None else names:
        path = folder / name
        try:
            if not path.is_file():
                lines.append(f"{name} is missing")
            elif file_digest(path) != expected[name]:
                lines.append(f"{name} is damaged (its checksum differs)")
        except OSError as error:
            lines.append(f"{name} cannot be read ({error.strerror})")
    return lines


def seal_folder(folder: Path) -> None:
    """Write the checksums of all files of a folder into it."""
    (folder / NAME).write_text(sealed({"files": digests(folder)}), encoding="utf-8")


def folder_damage(folder: Path, *, ignore: Iterable[str] = ()) -> list[str]:
    """Say what is wrong with the files of a folder that `seal_folder` has sealed, a line each; nothing if all is well.

    Args:
        ignore: files that may have been changed.
    """
    if not (folder / NAME).is_file():  # nothing, or a device that would be read until memory is gone
        return [f"{NAME} is missing"]
    try:
        values = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if not is_whole(values):
            return [f"{NAME} is damaged (its checksum differs)"]
        expected = dict(values["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{NAME} cannot be read ({error})"]
    return damage(folder, expected, names=[name for name in expected if name not in set(ignore)])


def sealed(values: Mapping[str, Any]) -> str:
    """Return a JSON object as text, with a checksum of itself."""
    return json.dumps({**values, "checksum": _checksum(values)}, indent=1) + "\n"


def is_whole(values: Mapping[str, Any]) -> bool:
    """Whether an object that `sealed` wrote has been read back unchanged."""
    rest = {key: value for key, value in values.items() if key != "checksum"}
    return values.get("checksum") == _checksum(rest)


def _checksum(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=16).hexdigest()
