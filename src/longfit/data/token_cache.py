"""Tokens on disk: a large set is tokenised once, and every later start maps the result into memory.

An entry is a folder named after everything that decides its tokens (the documents' digests, the tokenizer, the template
and the settings), so it can never be out of date; another setting is another entry. It is written beside its place and
renamed into it when it is whole: two processes that make the same entry each finish, and one of the results stays; a
process that is killed leaves an unfinished folder, which the next one removes a day later.

    TOKENS/KEY/ids.i32  trained.u8  documents.npz  notes.json

What this is not: a cache of windows. How documents are packed is decided anew in every run, and takes seconds.
"""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, overload

import numpy as np

from longfit.data.chat_notes import ChatNotes
from longfit.data.template import ChatTemplate
from longfit.data.tokenized import TokenizedDocument
from longfit.data.tokenizing import TokenizedSet
from longfit.files.checksums import folder_damage, seal_folder
from longfit.notice import notify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 3  # of an entry, and of what encoding makes of a chat: raise it when either changes
UNFINISHED_SECONDS = 24 * 3600.0  # after which a folder that nobody finished belongs to a process that died
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


class StoredDocuments(Sequence[TokenizedDocument]):
    """Tokenised documents whose tokens are mapped from files: they are read where they are used."""

    def __init__(self, folder: Path) -> None:
        table = np.load(folder / "documents.npz", allow_pickle=False)
        self.starts = table["starts"]  # int64 [N + 1], in tokens
        self.num_special = table["num_special"]  # int32 [N]
        self.is_chat = table["is_chat"]  # bool [N]
        self._name_starts, self._names = table["name_starts"], table["names"]  # int64 [N + 1]; uint8
        self.ids = _mapped(folder / "ids.i32", np.int32)
        self.trained = _mapped(folder / "trained.u8", np.uint8)

    def __len__(self) -> int:
        return len(self.num_special)

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
        tokens = slice(int(self.starts[index]), int(self.starts[index + 1]))
        name = self._names[self._name_starts[index] : self._name_starts[index + 1]].tobytes().decode()
        trained = self.trained[tokens].view(bool) if self.is_chat[index] else None
        return TokenizedDocument(name, self.ids[tokens], trained, int(self.num_special[index]))


def _mapped(path: Path, dtype: type) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class TokenWriter:
    """Collects tokenised documents into files, so that they never lie in memory together."""

    def __init__(self, place: Path) -> None:
        """Args: place: the entry that is to be; nothing appears there before `finish`."""
        self.place = place
        self.folder = place.with_name(f".{place.name}.{os.getpid()}.unfinished")
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place.parent)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self._ids: BinaryIO = (self.folder / "ids.i32").open("wb")
        self._trained: BinaryIO = (self.folder / "trained.u8").open("wb")
        self._lengths: list[int] = []
        self._num_special: list[int] = []
        self._is_chat = bytearray()
        self._names = bytearray()
        self._name_lengths: list[int] = []

    def __len__(self) -> int:
        return len(self._lengths)

    def extend(self, documents: Iterable[TokenizedDocument]) -> None:
        for document in documents:
            self._ids.write(np.ascontiguousarray(document.input_ids, dtype=np.int32).tobytes())
            trained = document.trained
            mask = np.ones(len(document.input_ids), dtype=np.uint8) if trained is None else trained.astype(np.uint8)
            self._trained.write(mask.tobytes())
            name = document.name.encode()
            self._names += name
            self._name_lengths.append(len(name))
            self._lengths.append(len(document.input_ids))
            self._num_special.append(document.num_special)
            self._is_chat.append(trained is not None)

    def finish(self, result: TokenizedSet) -> StoredDocuments:
        """Write the tables, and move the entry into its place."""
        self._ids.close()
        self._trained.close()
        np.savez(
            self.folder / "documents.npz",
            starts=np.cumsum([0, *self._lengths], dtype=np.int64),
            num_special=np.asarray(self._num_special, dtype=np.int32),
            is_chat=np.frombuffer(bytes(self._is_chat), dtype=np.bool_),
            name_starts=np.cumsum([0, *self._name_lengths], dtype=np.int64),
            names=np.frombuffer(bytes(self._names), dtype=np.uint8),
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
    said = json.loads((place / "notes.json").read_text(encoding="utf-8"))
    notes = ChatNotes(Counter(said["counts"]), Counter(said["unread"]), set(said["ends"]), Counter(said["decomposed"]))
    template = said["template"] and ChatTemplate(said["template"]["source"], said["template"]["special"])
    return TokenizedSet(StoredDocuments(place), template, notes, said["skipped"])


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(".*.unfinished"):
        with suppress(OSError):
            written = max(entry.stat().st_mtime for entry in (path, *path.iterdir()))
            if time.time() - written > UNFINISHED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
