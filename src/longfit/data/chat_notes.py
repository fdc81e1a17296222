"""What a user should know about how documents became tokens: counts, gathered on the way."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class ChatNotes:
    """Counts of documents, chats or turns, by the line that tells them."""

    counts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # keys of messages that the template does not read
    ends: set[str] = field(default_factory=set)  # tokens that end answers
    decomposed: Counter[str] = field(default_factory=Counter)  # tokens of decomposed Unicode: as it is, composed

    def update(self, other: "ChatNotes") -> None:
        self.counts.update(other.counts)
        self.unread.update(other.unread)
        self.ends |= other.ends
        self.decomposed.update(other.decomposed)
