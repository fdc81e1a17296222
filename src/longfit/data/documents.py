"""A file, a folder or an archive as a set of documents: checked once, then read whenever it is iterated.

The path is walked once to check and fingerprint everything, which keeps 28 bytes per document; iterating reads the text
again, one document at a time. So a folder larger than memory is never held, and every problem is known before the first
token is made.

    read_documents      a path -> its documents
    split_documents     documents -> those to train on, those held out
"""

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np

from longfit.data.document import Document
from longfit.data.extraction import Extraction
from longfit.data.files import find_files
from longfit.data.source_report import SourceReport, listing
from longfit.data.sources import FileSource, MemorySource, Reading, Source
from longfit.data.survey_cache import read_survey, survey_key, write_survey
from longfit.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Documents:
    """A set of documents that is read when it is iterated, not before. Iterate it as often as needed.

    Made by `read_documents`, or by `Documents.of` from documents in memory. What is kept of each document is where it
    is and what identifies it, 28 bytes: a set larger than memory is described in little of it.
    """

    sources: tuple[Source, ...]
    source: np.ndarray  # int32 [N], index into `sources`
    position: np.ndarray  # int64 [N], among the documents of its source
    digests: np.ndarray  # uint8 [N, 16]
    report: SourceReport
    is_chat: bool = False  # whether they are chats, or all texts

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "Documents":
        """Wrap documents that are in memory."""
        return _survey([MemorySource(tuple(documents))], num_bytes=0, skipped=())

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents in order, reading each source once.

        Raises: DataError: a file changed since it was surveyed.
        """
        edges = np.flatnonzero(np.diff(self.source, prepend=-1, append=-1))
        for start, stop in pairwise(edges.tolist()):
            source = self.sources[self.source[start]]
            found = start
            for position, document in enumerate(source.read([])):
                if position == self.position[found]:
                    if document.fingerprint() != self.digests[found].tobytes():
                        raise DataError(f"{document.name}: changed while it was being read; start again")
                    found += 1
                    yield document
                    if found == stop:
                        break
            if found != stop:
                raise DataError(
                    f"{stop - found:,} documents vanished from {source} while it was being read; start again"
                )

    def select(self, kept: np.ndarray) -> "Documents":
        """Keep some of the documents, in their present order.

        Args: kept: bool ``[N]``.
        """
        return replace(self, source=self.source[kept], position=self.position[kept], digests=self.digests[kept])

    def num_shared(self, other: "Documents") -> int:
        """How many different documents are in both sets."""
        return len(np.intersect1d(_comparable(self.digests), _comparable(other.digests)))

    def digest(self) -> str:
        """One digest of all contents in their order, in hexadecimal."""
        return blake2b(np.ascontiguousarray(self.digests).tobytes(), digest_size=16).hexdigest()


def read_documents(
    path: str | Path,
    *,
    text_column: str | None = None,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
    exclude: Sequence[str] = (),
    normalise: str = "none",
    bad_rows: str = "stop",
    cache: Path | None = None,
    cached_bytes: int = 0,
    on_document: Callable[[int], None] | None = None,
) -> Documents:
    """Find and check every document under a path.

    Folders are walked recursively, in sorted order; hidden files, unknown extensions, symbolic links to folders and
    archives inside archives are not read, and listed in `Documents.report`. A file named directly is read as text
    whatever its extension.

    Args:
        path: a text, a document, a table (.jsonl .json .csv .tsv .parquet .arrow), an archive, or a folder of them.
        text_column: the column of tables that holds plain text; None recognises it by name (see `layouts.py`).
        columns: a map from our names (`layouts.MAPPED`) to the table's columns.
        encoding: of text files and tables, if not UTF-8.
        exclude: glob patterns, matched against the path relative to `path` and each of its parts.
        normalise: "nfc" composes decomposed Unicode, "none" leaves it.
        bad_rows: "stop" at rows and files that cannot be used, "skip" them and list them in the report.
        cache: folder that keeps what is known of documents from one start to the next; None keeps nothing.
        cached_bytes: of files, below which nothing is kept: reading them again takes less time.
        on_document: called with the number of documents read so far, for progress.
    Raises:
        DataError: as :func:`find_files`, or damaged files: all of them in one message, each with its place.
        ConfigError: unknown encoding or column name.
    """
    path = Path(path)
    found, skipped = find_files(path, exclude)
    reading = Reading(encoding, text_column, tuple((columns or {}).items()), normalise, bad_rows)
    files = [FileSource(*file, reading) for file in found]
    paths = list(dict.fromkeys(source.path for source in files))
    num_bytes = sum(file.stat().st_size for file in paths)
    kept_in = cache if num_bytes >= cached_bytes else None
    key = None if kept_in is None else survey_key(paths, found=[file.name for file in found], reading=reading)
    place = kept_in / f"{key}.npz" if kept_in is not None and key is not None else None
    if place is not None and (kept := read_survey(place)) is not None:
        arrays, report, is_chat = kept
        report = replace(report, skipped=tuple(skipped))
        return Documents(tuple(files), **arrays, report=report, is_chat=is_chat)
    documents = _survey(
        files, num_bytes=num_bytes, skipped=tuple(skipped), path=path, bad_rows=bad_rows, on_document=on_document
    )
    if place is not None and survey_key(paths, found=[file.name for file in found], reading=reading) == key:
        arrays = {"source": documents.source, "position": documents.position, "digests": documents.digests}
        write_survey(place, (arrays, replace(documents.report, skipped=()), documents.is_chat))
    return documents


def split_documents(
    documents: Documents,
    *,
    validation_fraction: float,
    seed: int = 0,
) -> tuple[Documents, Documents]:
    """Hold documents back for validation: whole documents, and never one whose twin is trained on.

    A document's side depends on the seed and its content only, so adding or renaming files moves few documents across.

    Args:
        validation_fraction: share of the documents, in [0, 1); at least one document if above 0.
        seed: another choice of documents.
    Returns: (training, validation); duplicates may make validation smaller than asked, never larger.
    Raises:
        ConfigError: a share out of range.
        DataError: too few different documents to leave one on each side.
    """
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction {validation_fraction}: must be at least 0 and below 1; try 0.05")
    total = len(documents)
    count = max(1, round(validation_fraction * total)) if validation_fraction else 0
    different, twin_of, sizes = np.unique(_comparable(documents.digests), return_inverse=True, return_counts=True)
    key = seed.to_bytes(16, "little", signed=True)
    ranks = bytearray()
    for digest in different:
        ranks += blake2b(digest, key=key).digest()[:16]  # of 64 bytes: as good as all of them
    order = np.lexsort(np.frombuffer(ranks, dtype=">u8").reshape(-1, 2).T[::-1])
    is_held = np.zeros(len(different), dtype=bool)
    held = 0
    for index in order.tolist():
        size = int(sizes[index])
        if held + size <= count and held + size < total:
            is_held[index] = True
            held += size
        if held == count:
            break
    if (count and not held) or count >= total > 0:
        raise DataError(
            f"{total:,} documents ({len(different):,} different) cannot give {count:,} to validation and keep one for "
            "training; name another text: data.validation=FILE"
            + (", or give a smaller data.validation_fraction" if len(different) > 1 and count > 1 else "")
        )
    return documents.select(~is_held[twin_of]), documents.select(is_held[twin_of])


def _comparable(digests: np.ndarray) -> np.ndarray:
    """Digests, uint8 ``[N, 16]``, as values of which numpy can say whether they are equal."""
    return np.ascontiguousarray(digests).view("V16")[:, 0]


def _survey(
    sources: Sequence[Source],
    *,
    num_bytes: int,
    skipped: tuple[tuple[str, str], ...],
    path: Path | None = None,
    bad_rows: str = "stop",
    on_document: Callable[[int], None] | None = None,
) -> Documents:
    """Read every source once: collect problems, drop empty documents, fingerprint the others."""
    places: tuple[array[int], array[int]] = array("i"), array("q")
    digests = bytearray()
    problems: list[str] = []
    empty: list[str] = []
    duplicates: list[str] = []
    extractions: list[tuple[str, Extraction]] = []
    unread: Counter[str] = Counter()
    num_words = num_decomposed = 0
    seen: set[bytes] = set()
    kinds: dict[bool, str] = {}  # is_chat -> the first such document
    for index, source in enumerate(sources):
        for position, document in enumerate(source.read(problems)):
            unread.update(document.unread)
            if on_document is not None:
                on_document(len(places[0]) + 1)
            if document.extraction is not None:
                extractions.append((document.name, document.extraction))
            if document.text is not None and not document.text.strip():
                empty.append(document.name)
                continue
            try:
                fingerprint = document.fingerprint()
            except DataError as error:
                problems.append(str(error))
                continue
            if fingerprint[:8] in seen:  # 64 bits: two of a million documents are taken for equal once in 37 million
                duplicates.append(document.name)
            seen.add(fingerprint[:8])
            for text in document.texts():
                if not text.isascii() and not unicodedata.is_normalized("NFC", text):
                    words = text.split()
                    num_words += len(words)
                    num_decomposed += sum(not unicodedata.is_normalized("NFC", word) for word in words)
            kinds.setdefault(document.is_chat, document.name)
            places[0].append(index)
            places[1].append(position)
            digests += fingerprint
    count = len(places[0])
    if problems and (bad_rows == "stop" or not count):
        raise DataError(_told(problems, count))
    if len(kinds) == 2:
        left_out = re.sub(r":\d+$", "", Path(kinds[False]).name)
        raise DataError(
            f"chats ({kinds[True]}) and plain text ({kinds[False]}) are mixed; "
            f"train on one kind, leave the other out, such as data.exclude='[\"{left_out}\"]'"
        )
    if not count:
        held = f"{len(empty):,} documents, all empty" if empty else "holds no rows"
        raise DataError(f"{path or 'the documents'}: {held}; nothing to train on")
    report = SourceReport(
        len(sources), num_bytes, skipped, tuple(empty), tuple(duplicates), tuple(problems), tuple(unread.most_common()),
        tuple(extractions), num_words, num_decomposed,
    )  # fmt: skip
    return Documents(
        tuple(sources),
        np.asarray(places[0], dtype=np.int32),
        np.asarray(places[1], dtype=np.int64),
        np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, 16),
        report,
        is_chat=True in kinds,
    )


def _told(problems: Sequence[str], num_good: int) -> str:
    """Show the first problems; of many rows, also how many they are and what can be done."""
    text = listing(problems, "problems")
    if num_good + len(problems) == 1 or not num_good:
        return text
    total = num_good + len(problems)
    return (
        f"{text}\n{len(problems):,} of {total:,} rows or files cannot be used; "
        "correct them, or leave them out with data.bad_rows=skip"
    )
