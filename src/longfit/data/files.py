"""Which files under a path are read, and as what: by their extension, in sorted order, each of the others with why not.

What this is not: it opens no file but the list of an archive, and does not know what is in them (`sources.py`).
"""

import difflib
import fnmatch
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from longfit.errors import DataError

TEXT_SUFFIXES = frozenset(
    """.txt .text .md .markdown .rst .adoc .org .tex .bib .log .srt .vtt .xml .css .toml .yaml .yml .ini .cfg .py .pyi
    .c .h .cc .cpp .cxx .hpp .cu .cuh .java .js .mjs .ts .tsx .jsx .vue .go .rs .rb .php .swift .kt .scala .sh .sql
    .lua .pl .r .jl .hs .ml .ex .erl .clj .cs .m .f90""".split()  # noqa: SIM905 (sixty lines otherwise)
)
KIND_OF_SUFFIX = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".zip": "zip",
}
CONVERT_FIRST = {
    ".pdf": "pdftotext -layout FILE.pdf FILE.txt",
    ".docx": "pandoc FILE.docx -o FILE.txt",
    ".odt": "pandoc FILE.odt -o FILE.txt",
    ".epub": "pandoc FILE.epub -o FILE.txt",
    ".gz": "gunzip FILE.gz",
    ".tar": "tar -xf FILE.tar",
}
SAVED_SET_METADATA = frozenset(
    {"dataset_info.json", "dataset_dict.json", "state.json"}
)  # beside the .arrow files of save_to_disk


class FoundFile(NamedTuple):
    """One file to read, on disk or in a zip archive."""

    path: Path  # of the file or of the archive
    name: str  # relative to what the user named, as printed
    kind: str  # a value of KIND_OF_SUFFIX
    member: str | None = None  # of the archive


Skipped = tuple[str, str]  # file, why it is not read


def find_files(path: Path, exclude: Sequence[str] = ()) -> tuple[list[FoundFile], list[Skipped]]:
    """Find what is to be read under a path: a file, an archive or a folder.

    Args:
        path: must exist; a file named directly is read as text where its extension is unknown.
        exclude: glob patterns, matched against the path relative to `path` and each of its parts.
    Returns: the files in the order in which they are read, at least one; the others, each with why it is not read.
    Raises: DataError: nothing there, nothing readable, a damaged archive, or a kind that must be converted first.
    """
    if not path.exists():
        raise DataError(_missing(path))
    found, skipped = _walk_folder(path, exclude) if path.is_dir() else _single_file(path, exclude)
    if not found:
        raise DataError(_nothing_readable(path, skipped))
    return found, skipped


def _single_file(path: Path, exclude: Sequence[str]) -> tuple[list[FoundFile], list[Skipped]]:
    suffix = path.suffix.lower()
    if suffix in CONVERT_FIRST:
        raise DataError(f"{path}: {suffix} is not read; convert it first, for example: {CONVERT_FIRST[suffix]}")
    kind = KIND_OF_SUFFIX.get(suffix, "text")
    return _walk_archive(path, path.name, exclude) if kind == "zip" else ([FoundFile(path, path.name, kind)], [])


def _walk_folder(root: Path, exclude: Sequence[str]) -> tuple[list[FoundFile], list[Skipped]]:
    found: list[FoundFile] = []
    skipped: list[Skipped] = []
    for folder, folders, files in os.walk(root):
        for name in sorted(folders):
            relative = (Path(folder) / name).relative_to(root).as_posix()
            if name.startswith("."):
                skipped.append((relative + "/", "hidden folder"))
            elif (Path(folder) / name).is_symlink():
                skipped.append((relative + "/", "symbolic link to a folder"))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            file = Path(folder) / name
            relative = file.relative_to(root).as_posix()
            reason = _why_skip(relative, exclude)
            if reason is None and not file.is_file():
                reason = "broken link or special file"
            if reason is not None:
                skipped.append((relative, reason))
            elif (kind := KIND_OF_SUFFIX[file.suffix.lower()]) == "zip":
                inside, skipped_inside = _walk_archive(file, relative, exclude)
                found += inside
                skipped += skipped_inside
            else:
                found.append(FoundFile(file, relative, kind))
    return sorted(found, key=lambda item: item.name.split("/")), sorted(skipped)


def _walk_archive(path: Path, shown: str, exclude: Sequence[str]) -> tuple[list[FoundFile], list[Skipped]]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            members = sorted((entry.filename, entry.flag_bits & 1) for entry in entries)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: not a readable zip archive: {error}") from None
    found: list[FoundFile] = []
    skipped: list[Skipped] = []
    for member, encrypted in members:
        reason = _why_skip(member, exclude) or ("encrypted" if encrypted else None)
        kind = KIND_OF_SUFFIX.get(Path(member).suffix.lower(), "")
        if reason is None and kind == "zip":
            reason = "archive inside an archive"
        if reason is None:
            found.append(FoundFile(path, f"{shown}!/{member}", kind, member))
        else:
            skipped.append((f"{shown}!/{member}", reason))
    return found, skipped


def _why_skip(relative: str, exclude: Sequence[str]) -> str | None:
    """Say why a file of a folder is not read, or None if it is."""
    parts = relative.split("/")
    suffix = Path(relative).suffix.lower()
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return "hidden"
    if any(fnmatch.fnmatch(name, pattern) for pattern in exclude for name in (relative, *parts)):
        return "excluded"
    if parts[-1] in SAVED_SET_METADATA:
        return "metadata of a saved data set"
    if suffix not in KIND_OF_SUFFIX:
        return f"of unknown kind {suffix}" if suffix else "without extension"
    return None


def _missing(path: Path) -> str:
    """Name the first part of the path that is not there, and what is there that looks like it."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        missing, existing = existing, existing.parent
    message = f"{path}: does not exist"
    if not existing.is_dir():
        return f"{message} ({existing} is a file)"
    close = difflib.get_close_matches(missing.name, [entry.name for entry in existing.iterdir()], n=3, cutoff=0.5)
    if close:
        return f"{message}; did you mean {' or '.join(str(existing / name) for name in close)}?"
    return f"{message}; give a text file, a table (.jsonl .json .csv .parquet), a .zip or a folder of them"


def _nothing_readable(path: Path, skipped: Sequence[Skipped]) -> str:
    kind = "folder" if path.is_dir() else "archive"
    if not skipped:
        return f"{path}: the {kind} is empty; put text files or tables (.jsonl .json .csv .parquet) into it"
    examples = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    convert = {CONVERT_FIRST[suffix] for name, _ in skipped if (suffix := Path(name).suffix.lower()) in CONVERT_FIRST}
    readable = "readable: text, source code, .html, .jsonl, .json, .csv, .parquet, .zip"
    advice = f"convert first, for example: {min(convert)}" if convert else readable
    return f"{path}: nothing readable among {len(skipped):,} files of the {kind} ({examples}); {advice}"
