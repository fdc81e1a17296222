"""One document as tokens, some documents as tokens, and what was noticed on the way."""

from dataclasses import dataclass, field

import numpy as np

from longfit.data.chat_notes import ChatNotes


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedDocument:
    """One document as tokens.

    Plain text has no `trained` mask (every token is a target) and gets an end token when packed; a chat has both its
    mask and, from its template, its end tokens.
    """

    name: str
    input_ids: np.ndarray  # int32 [N]
    trained: np.ndarray | None = None  # bool [N]
    num_special: int = 0  # special tokens that were spelled out in the text itself

    @property
    def is_chat(self) -> bool:
        """Whether only some of the tokens are targets."""
        return self.trained is not None


@dataclass(slots=True)
class Tokenized:
    """What an encoder made of some documents.

    Attributes:
        num_documents: that it was given.
        documents: their tokens, in order; a chat whose template rewrites turns gives several, a refused one none.
        problems: what was refused, each with its place.
    """

    num_documents: int
    documents: list[TokenizedDocument] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: ChatNotes = field(default_factory=ChatNotes)
