"""What a user should know about how chats were read: counts, gathered while they become tokens."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class ChatNotes:
    """What a user should know about how chats were read: counts of chats or turns, by the line that tells them."""

    counts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # keys of messages that the template does not read
    ends: set[str] = field(default_factory=set)  # tokens that end answers

    def update(self, other: "ChatNotes") -> None:
        self.counts.update(other.counts)
        self.unread.update(other.unread)
        self.ends |= other.ends
