"""One tokenizer, template and choice of what is trained, applied to many chats: tokens, refusals and counts.

It can be sent to another process (`chat_workers.py`): what it is made of is sent, and the template is compiled there.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from longfit.data.chat_notes import ChatNotes
from longfit.data.document import Document
from longfit.data.encoding import encode_chat
from longfit.data.template import choose_template
from longfit.data.text_encoder import DecomposedCost
from longfit.data.tokenized import Tokenized, TokenizedDocument
from longfit.data.turn_end import find_turn_end
from longfit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatEncoder:
    """Encodes chats, all in the same way."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        template: str | None = None,
        train_on: str = "all",
        template_drops: str = "error",
        date: str | None = None,
        stop_ids: Collection[int] = (),
    ) -> None:
        """Args: as of `tokenize_documents`.

        Raises: ConfigError: no template.
        """
        self.tokenizer = tokenizer
        self.settings: dict[str, Any] = {
            "template": template,
            "train_on": train_on,
            "template_drops": template_drops,
            "date": date,
            "stop_ids": tuple(stop_ids),
        }
        stops = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(stop_ids)) if token]
        self.template = choose_template(tokenizer, template, date=date, stops=stops)
        self._decomposed = DecomposedCost(tokenizer)
        self.turn_end = find_turn_end(self.template, stops=stops)

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (self.tokenizer, self.settings)

    def __call__(self, documents: Sequence[Document]) -> Tokenized:
        """Encode chats; what is refused is a problem with its place."""
        found = Tokenized(len(documents))
        for document in documents:
            assert document.chat is not None
            notes = ChatNotes()
            try:
                rows = encode_chat(
                    document.chat,
                    self.tokenizer,
                    template=self.template,
                    turn_end=self.turn_end,
                    train_on=self.settings["train_on"],
                    template_drops=self.settings["template_drops"],
                    notes=notes,
                )
            except DataError as error:
                found.problems.append(f"{document.name}: {error}")
            else:
                found.documents += [TokenizedDocument(document.name, row.input_ids, row.trained) for row in rows]
                found.notes.update(notes)
                self._decomposed.add(document, found.notes)
        return found


def _make(tokenizer: "PreTrainedTokenizerBase", settings: dict[str, Any]) -> ChatEncoder:
    return ChatEncoder(tokenizer, **settings)
