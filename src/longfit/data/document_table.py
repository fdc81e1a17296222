"""What packing and the ledger ask of every document, as arrays: a million documents take 26 MB, and no loop.

What this is not: the tokens. Documents of which only a part is trained on are looked into one by one.
"""

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from longfit.data.tokenized import TokenizedDocument


@dataclass(frozen=True, slots=True, eq=False)
class DocumentTable:
    """Parallel arrays, an entry a document."""

    length: np.ndarray  # int64 [N], stored tokens
    num_trained: np.ndarray  # int64 [N], of a chat: its trained tokens behind the first
    last_id: np.ndarray  # int32 [N], of the last token; -1 where there is none
    is_chat: np.ndarray  # bool [N]
    first_trained: np.ndarray  # bool [N], of a chat: whether its first token is trained
    num_special: np.ndarray  # int32 [N], control tokens that a text spells out

    def __len__(self) -> int:
        return len(self.length)

    @classmethod
    def of(cls, documents: Iterable[TokenizedDocument]) -> "DocumentTable":
        """Look into documents once each."""
        rows = TableRows()
        for document in documents:
            rows.add(document)
        return rows.table()

    def lengths(self, *, eos_token_id: int | None) -> np.ndarray:
        """Each document's tokens, int64 ``[N]``, with the end token that packing appends to texts that lack it."""
        if eos_token_id is None:
            return self.length
        return self.length + (~self.is_chat & (self.last_id != eos_token_id))


class TableRows:
    """A table in the making, 26 bytes a document."""

    def __init__(self) -> None:
        self._columns = [array(code) for code in "qqibbi"]

    def __len__(self) -> int:
        return len(self._columns[0])

    def add(self, document: TokenizedDocument) -> None:
        """Look into a document."""
        ids, trained = document.input_ids, document.trained
        row = (
            len(ids),
            0 if trained is None else int(trained[1:].sum()),
            int(ids[-1]) if len(ids) else -1,
            trained is not None,
            trained is not None and bool(trained[:1].any()),
            document.num_special,
        )
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)

    def table(self) -> DocumentTable:
        """The table, when all documents are in it."""
        dtypes = (np.int64, np.int64, np.int32, np.bool_, np.bool_, np.int32)
        return DocumentTable(*(np.asarray(c, dtype=dtype) for c, dtype in zip(self._columns, dtypes, strict=True)))


class TabledDocuments(Sequence[TokenizedDocument]):
    """Documents that have a table of their own."""

    @property
    @abstractmethod
    def table(self) -> DocumentTable: ...


def table_of(documents: Sequence[TokenizedDocument]) -> DocumentTable:
    """The table of documents: their own, or a new one."""
    return documents.table if isinstance(documents, TabledDocuments) else DocumentTable.of(documents)


def count_targets(
    documents: Sequence[TokenizedDocument],
    table: DocumentTable,
    document: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Count what is learned in pieces of documents.

    Args:
        document, start, stop: int64 ``[P]``, a piece each; texts may reach one past their tokens, for the end token.
    Returns: int64 ``[P]``, tokens that are predicted from others of their piece; bool ``[P]``, whether the first token
        of the piece would be, were there anything before it.
    """
    is_chat = table.is_chat[document]
    targets = np.where(is_chat, table.num_trained[document], stop - start - 1)
    first = np.where(is_chat, table.first_trained[document], True)
    for piece in np.flatnonzero(is_chat & ((start > 0) | (stop < table.length[document]))).tolist():
        trained = documents[document[piece]].trained
        assert trained is not None
        begin, end = int(start[piece]), int(stop[piece])
        targets[piece], first[piece] = trained[begin + 1 : end].sum(), trained[begin]
    return targets, first
