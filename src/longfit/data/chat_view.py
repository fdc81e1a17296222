"""What becomes of a chat, to look at: which of its text is trained, masked, added by the template, or dropped by it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from longfit.data.answer_spans import Row
from longfit.data.chat_encoder import ChatEncoder
from longfit.data.chat_notes import ChatNotes
from longfit.data.encoding import render_answers, where
from longfit.data.messages import Chat
from longfit.data.provenance import Piece

Kind = Literal["trained", "masked", "added", "dropped"]
KINDS: tuple[Kind, ...] = ("trained", "masked", "added", "dropped")


@dataclass(frozen=True, slots=True)
class Part:
    """A run of text that has one fate. Dropped parts stand behind the text that they are missing from."""

    text: str
    kind: Kind


def view_chat(chat: Chat, encoder: ChatEncoder) -> list[list[Part]]:
    """Show each rendering of a chat in parts; what the template drops is shown, not refused.

    Raises: DataError: the template refuses the chat, or nothing of it is trained.
    """
    rows, lost = render_answers(
        chat,
        encoder.template,
        turn_end=encoder.turn_end,
        train_on=encoder.settings["train_on"],
        template_drops="allow",
        notes=ChatNotes(),
    )
    views = [_parts(row) for row in rows]
    views[-1] += _dropped(lost)
    return views


def _parts(row: Row) -> list[Part]:
    """Cut a rendering where the fate of its characters changes."""
    text = row.rendering.text
    kinds = np.full(len(text), KINDS.index("added"), dtype=np.int8)
    if row.rendering.segments is None:  # the template computes: nobody knows whose a character is
        kinds[:] = KINDS.index("masked")
    for segment in row.rendering.segments or ():
        kinds[segment.start : segment.end] = KINDS.index("masked")
    for start, end in row.spans:
        kinds[start:end] = KINDS.index("trained")
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(text)]
    return [Part(text[start:stop], KINDS[int(kinds[start])]) for start, stop in pairwise(edges)]


def _dropped(lost: Sequence[Piece]) -> list[Part]:
    return [Part(f"{where(piece)}: {piece.said}", "dropped") for piece in lost]
