"""One document: a text or a chat, where it came from, and the digest that tells it from others."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from longfit.data.extraction import Extraction
from longfit.data.messages import Chat, Message
from longfit.errors import DataError


@dataclass(frozen=True, slots=True)
class Document:
    """One unit that is trained on whole: a text, or a chat.

    `line` is where its row begins in `source` (the row's number in Parquet and Arrow files); None for a whole file.
    `unread` are the columns of its row that say something and that nothing reads.
    """

    name: str
    text: str | None = None
    chat: Chat | None = None
    source: str = ""
    line: int | None = None
    unread: tuple[str, ...] = ()
    extraction: Extraction | None = None

    @property
    def is_chat(self) -> bool:
        """Whether it holds turns rather than text."""
        return self.chat is not None

    @property
    def messages(self) -> tuple[Message, ...] | None:
        """The turns of a chat."""
        return None if self.chat is None else self.chat.messages

    def fingerprint(self) -> bytes:
        """Digest of the content: equal documents are duplicates.

        Raises: DataError: the text is not valid Unicode.
        """
        content = self.text
        if content is None:
            said = self.chat.said() if self.chat is not None else []
            content = json.dumps(said, sort_keys=True, ensure_ascii=False, default=str)
        try:
            return blake2b(content.encode(), digest_size=16).digest()
        except UnicodeEncodeError as error:  # JSON can say "\ud83d" alone; no tokenizer can read it
            half = ascii(content[error.start])
            raise DataError(f"{self.name}: half a character, {half}, at {error.start:,}; write the whole one") from None

    def texts(self) -> Iterator[str]:
        """The text, or what the turns say."""
        if self.text is not None:
            yield self.text
        for message in self.messages or ():
            yield message["content"]

    def num_chars(self) -> int:
        """Characters of text, or of all messages' contents."""
        return sum(map(len, self.texts()))
