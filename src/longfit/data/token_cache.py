"""Tokens on disk: a large set is tokenised once, and every later start maps the result into memory.

An entry is a folder named after everything that decides its tokens (the documents' digests, the tokenizer, the template
and the settings), so it can never be out of date; another setting is another entry. It is written beside its place and
renamed into it when it is whole: two processes that make the same entry each finish, and one of the results stays; a
process that is killed leaves an unfinished folder, which the next one removes a day later. When all entries together
are larger than a limit, those used longest ago are removed, said; who has one mapped keeps it.

    TOKENS/KEY/ids.i32  trained.u8  documents.npz  notes.json

What this is not: a cache of windows. How documents are packed is decided anew in every run, and takes seconds.
"""

import json
import mmap
import os
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, overload

import numpy as np

from longfit.data.chat_notes import ChatNotes
from longfit.data.document_table import DocumentTable, TabledDocuments, TableRows
from longfit.data.template import ChatTemplate
from longfit.data.tokenized import TokenizedDocument
from longfit.data.tokenizing import TokenizedSet
from longfit.files.checksums import folder_damage, seal_folder
from longfit.notice import notify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 5  # of an entry, and of what encoding makes of a chat: raise it when either changes
UNFINISHED_SECONDS = 24 * 3600.0  # after which a folder that nobody finished belongs to a process that died
MAPPED_BYTES = 64 << 20  # of a file that are looked at before its pages are given back
MAPPED_AROUND_BYTES = 64 << 10  # that Linux maps where one byte is looked at
ADVICE: int | None = getattr(mmap, "MADV_DONTNEED", None)  # Windows has none, and counts mapped pages otherwise
CACHED_BYTES = 8 << 20  # smaller files are tokenised again in less time than an entry is worth


def cache_folder() -> Path:
    """The user's cache folder: ``$LONGFIT_CACHE``, else where the system keeps caches."""
    if given := os.environ.get("LONGFIT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longfit"


def entry_key(tokenizer: "PreTrainedTokenizerBase", **settings: object) -> str | None:
    """Name an entry after all that decides it; None for tokenizers written in Python, which cannot be written down."""
    if not tokenizer.is_fast:
        return None
    said = [
        FORMAT,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        settings,
    ]
    return blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


class StoredDocuments(TabledDocuments):
    """Tokenised documents whose tokens are mapped from files: they are read where they are used."""

    def __init__(self, folder: Path) -> None:
        found = np.load(folder / "documents.npz", allow_pickle=False)
        self._table = DocumentTable(*(found[column.name] for column in fields(DocumentTable)))
        self._starts = np.concatenate([[0], np.cumsum(self._table.length)])  # int64 [N + 1], in tokens
        self._name_starts = np.concatenate([[0], np.cumsum(found["name_lengths"], dtype=np.int64)])
        self._names = found["names"]  # uint8
        self._ids = MappedFile(folder / "ids.i32", np.int32)
        self._trained = MappedFile(folder / "trained.u8", np.uint8)

    @property
    def table(self) -> DocumentTable:
        return self._table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> TokenizedDocument: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedDocument]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        name = self._names[self._name_starts[index] : self._name_starts[index + 1]].tobytes().decode()
        start, stop = int(self._starts[index]), int(self._starts[index + 1])
        trained = self._trained.take(start, stop).view(bool) if self._table.is_chat[index] else None
        return TokenizedDocument(name, self._ids.take(start, stop), trained, int(self._table.num_special[index]))


class MappedFile:
    """An array in a file, mapped into memory; what was looked at long ago does not stay there.

    A mapped page that was read counts as memory of this process until the system is short of it, so that one pass over
    a large set would look as large as the set. Now and then all pages are given back: they stay in the system's cache
    of the file, and are mapped again where they are looked at again.
    """

    def __init__(self, path: Path, dtype: type) -> None:
        # An empty file cannot be mapped.
        self._array: np.ndarray = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
        self._seen_bytes = 0

    def take(self, start: int, stop: int) -> np.ndarray:
        """A view of entries from `start` to `stop`."""
        taken = self._array[start:stop]
        self._seen_bytes += taken.nbytes + MAPPED_AROUND_BYTES
        if self._seen_bytes > MAPPED_BYTES:
            self._seen_bytes = 0
            mapping = getattr(self._array, "_mmap", None)
            if mapping is not None and ADVICE is not None:
                mapping.madvise(ADVICE)
        return taken


class TokenWriter:
    """Collects tokenised documents into files, so that they never lie in memory together."""

    def __init__(self, place: Path, *, limit_bytes: int | None = None) -> None:
        """Prepare to write.

        Args:
            place: the entry that is to be; nothing appears there before `finish`.
            limit_bytes: of all entries beside it; None for no limit.
        """
        self.place, self.limit_bytes = place, limit_bytes
        self.folder = place.with_name(f".{place.name}.{os.getpid()}.unfinished")
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place.parent)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self._ids: BinaryIO = (self.folder / "ids.i32").open("wb")
        self._trained: BinaryIO = (self.folder / "trained.u8").open("wb")
        self._rows = TableRows()
        self._names = bytearray()
        self._name_lengths = array("i")

    def __len__(self) -> int:
        return len(self._rows)

    def extend(self, documents: Iterable[TokenizedDocument]) -> None:
        for document in documents:
            self._ids.write(np.ascontiguousarray(document.input_ids, dtype=np.int32).data)
            trained = document.trained
            mask = np.ones(len(document.input_ids), dtype=np.uint8) if trained is None else trained.astype(np.uint8)
            self._trained.write(mask.data)
            name = document.name.encode()
            self._names += name
            self._name_lengths.append(len(name))
            self._rows.add(document)

    def finish(self, result: TokenizedSet) -> StoredDocuments:
        """Write the tables, and move the entry into its place."""
        self._ids.close()
        self._trained.close()
        table = self._rows.table()
        np.savez(
            self.folder / "documents.npz",
            **{column.name: getattr(table, column.name) for column in fields(table)},
            name_lengths=np.asarray(self._name_lengths, dtype=np.int32),
            names=np.frombuffer(self._names, dtype=np.uint8),
        )
        notes, template = result.notes, result.template
        said = {
            "counts": notes.counts,
            "unread": notes.unread,
            "ends": sorted(notes.ends),
            "decomposed": notes.decomposed,
            "skipped": result.skipped,
            "template": None if template is None else {"source": template.source, "special": template.special_tokens},
        }
        (self.folder / "notes.json").write_text(json.dumps(said), encoding="utf-8")
        seal_folder(self.folder)
        with suppress(OSError):  # another process was quicker: its entry holds the same
            self.folder.rename(self.place)
        stored = StoredDocuments(self.place)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.limit_bytes is not None:
            trim(self.place, limit_bytes=self.limit_bytes)
        return stored

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._ids.close()
        self._trained.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def read_entry(place: Path) -> TokenizedSet | None:
    """Map an entry into memory; None if it is not there, or not as it was written: then it is removed."""
    if not place.is_dir():
        return None
    if found := folder_damage(place):
        notify(f"{place}: {found[0]}; the tokens are made again")
        shutil.rmtree(place, ignore_errors=True)
        return None
    try:
        os.utime(place)  # used now, so removed last
        stored = StoredDocuments(place)
        said = json.loads((place / "notes.json").read_text(encoding="utf-8"))
    except FileNotFoundError:  # another process has removed it
        return None
    notes = ChatNotes(Counter(said["counts"]), Counter(said["unread"]), set(said["ends"]), Counter(said["decomposed"]))
    template = said["template"] and ChatTemplate(said["template"]["source"], said["template"]["special"])
    return TokenizedSet(stored, template, notes, said["skipped"])


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(".*.unfinished"):
        with suppress(OSError):
            written = max(entry.stat().st_mtime for entry in (path, *path.iterdir()))
            if time.time() - written > UNFINISHED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def trim(newest: Path, *, limit_bytes: int) -> None:
    """Remove the entries used longest ago while all of them together are larger than the limit; never the newest."""
    entries = []
    for path in newest.parent.iterdir():
        with suppress(OSError):  # another process removes it at this moment
            if path.is_dir() and not path.name.startswith("."):
                entries.append((path.stat().st_mtime, path, sum(file.stat().st_size for file in path.iterdir())))
    total = sum(size for _, _, size in entries)
    for _, path, size in sorted(entries):
        if total <= limit_bytes or path == newest:
            continue
        removed = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        with suppress(OSError):
            path.rename(removed)  # whole or not there, for who looks for it now
            shutil.rmtree(removed, ignore_errors=True)
            total -= size
            notify(
                f"{path}: cached tokens, not used for longest, are removed: the cache holds more than {limit_bytes:,} "
                "bytes (data.cache_limit)"
            )
