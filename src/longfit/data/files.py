"""Which files under a path are read, and as what: by their extension, in sorted order, each of the others with why not.

What this is not: it opens no file but the list of an archive, and does not know what is in them (`sources.py`).
"""

import difflib
import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from longfit.data.containers import archive_kind, inner_name, list_members
from longfit.errors import DataError
from longfit.files.reading import require_regular

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
    ".pdf": "pdf",
    ".docx": "docx",
    ".pptx": "pptx",
    ".epub": "epub",
    ".ipynb": "ipynb",
    ".eml": "eml",
    ".mbox": "mbox",
    ".mht": "mht",
    ".mhtml": "mht",
}
CONVERT_FIRST = {  # formats whose bytes are markup or machine code around the text: never trained on as they are
    **{suffix: f"pandoc FILE{suffix} -o FILE.txt" for suffix in (".odt", ".rtf", ".fb2", ".docbook")},
    **{
        suffix: f"libreoffice --headless --convert-to txt FILE{suffix}"
        for suffix in (".doc", ".ppt", ".odp", ".pages", ".wpd")
    },
    **{suffix: f"libreoffice --headless --convert-to csv FILE{suffix}" for suffix in (".xls", ".xlsx", ".ods")},
    **{suffix: f"ebook-convert FILE{suffix} FILE.txt" for suffix in (".mobi", ".azw", ".azw3", ".lit")},
    ".msg": "msgconvert FILE.msg",
    ".svg": "inkscape FILE.svg --export-type=pdf",
    ".ps": "ps2ascii FILE.ps FILE.txt",
    ".eps": "ps2ascii FILE.eps FILE.txt",
    ".djvu": "djvutxt FILE.djvu FILE.txt",
    ".7z": "7z x FILE.7z",
    ".rar": "unrar x FILE.rar",
    ".lz4": "unlz4 FILE.lz4",
    ".br": "brotli -d FILE.br",
}
SAVED_SET_METADATA = frozenset(
    {"dataset_info.json", "dataset_dict.json", "state.json"}
)  # beside the .arrow files of save_to_disk


class FoundFile(NamedTuple):
    """One file to read, or one archive with the members of it that are read."""

    path: Path
    name: str  # relative to what the user named, as printed
    kind: str  # a value of KIND_OF_SUFFIX, or "archive"
    members: tuple[tuple[str, str], ...] = ()  # of an archive: each name, and its kind


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
    if not path.is_dir():
        require_regular(path, DataError)
    found, skipped = _walk_folder(path, exclude) if path.is_dir() else _single_file(path, exclude)
    if not found:
        raise DataError(_nothing_readable(path, skipped))
    return found, skipped


def _single_file(path: Path, exclude: Sequence[str]) -> tuple[list[FoundFile], list[Skipped]]:
    if archive_kind(path.name):
        return _walk_archive(path, path.name, exclude)
    suffix = path.suffix.lower()
    if suffix in CONVERT_FIRST:
        raise DataError(f"{path}: {suffix} is not read; convert it first, for example: {CONVERT_FIRST[suffix]}")
    return [FoundFile(path, path.name, kind_of(path.name) or "text")], []


def kind_of(name: str) -> str | None:
    """What a file is read as, from its name without the ending of its compression; None where that is unknown."""
    return KIND_OF_SUFFIX.get(Path(inner_name(name)).suffix.lower())


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
            elif archive_kind(name):
                inside, skipped_inside = _walk_archive(file, relative, exclude)
                found += inside
                skipped += skipped_inside
            else:
                found.append(FoundFile(file, relative, kind_of(name) or "text"))
    return sorted(found, key=lambda item: item.name.split("/")), sorted(skipped)


def _walk_archive(path: Path, shown: str, exclude: Sequence[str]) -> tuple[list[FoundFile], list[Skipped]]:
    members: list[tuple[str, str]] = []
    skipped: list[Skipped] = []
    for member in list_members(path):
        reason = _why_skip(member.name, exclude) or ("encrypted" if member.is_encrypted else None)
        if reason is None and archive_kind(member.name):
            reason = "archive inside an archive"
        if reason is None:
            members.append((member.name, kind_of(member.name) or "text"))
        else:
            skipped.append((f"{shown}!/{member.name}", reason))
    return ([FoundFile(path, shown, "archive", tuple(members))] if members else []), sorted(skipped)


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
    if archive_kind(relative) or kind_of(relative):
        return None
    return f"of unknown kind {suffix}" if suffix else "without extension"


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
    return f"{message}; give a text file, a table (.jsonl .json .csv .parquet), an archive or a folder of them"


def _nothing_readable(path: Path, skipped: Sequence[Skipped]) -> str:
    kind = "folder" if path.is_dir() else "archive"
    if not skipped:
        return f"{path}: the {kind} is empty; put text files or tables (.jsonl .json .csv .parquet) into it"
    examples = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    convert = {CONVERT_FIRST[suffix] for name, _ in skipped if (suffix := Path(name).suffix.lower()) in CONVERT_FIRST}
    readable = "readable: text, source code, .html, .pdf, .docx, .epub, .jsonl, .json, .csv, .parquet, archives of them"
    advice = f"convert first, for example: {min(convert)}" if convert else readable
    return f"{path}: nothing readable among {len(skipped):,} files of the {kind} ({examples}); {advice}"
