"""Plain texts become tokens as they are: what spells out a control token is text, unless it is to be control."""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from longfit.data.chat_notes import ChatNotes
from longfit.data.document import Document
from longfit.data.template import control_pattern, control_tokens
from longfit.data.tokenized import Tokenized, TokenizedDocument
from longfit.data.tokenizing_border import tokenizing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPELT = (
    "documents spell out control tokens; they are tokenised as text (data.control_tokens=control takes them for the "
    "model's own)"
)
DECOMPOSED_CHARS = 1 << 18  # of decomposed Unicode: enough to measure what it costs


class TextEncoder:
    """Tokenises texts, all in the same way."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, control_tokens: str = "text") -> None:
        """Args: control_tokens: what those are that a text spells out: "text", or the model's own ("control")."""
        self.tokenizer, self.control_tokens = tokenizer, control_tokens
        self._decomposed = DecomposedCost(tokenizer)

    def __call__(self, documents: Sequence[Document]) -> Tokenized:
        """Tokenise texts together; those that spell out control tokens again, if they are to be text."""
        tokenizer, found = self.tokenizer, Tokenized(len(documents))
        control = control_pattern(tokenizer)
        spells = [bool(control and control.search(document.text or "")) for document in documents]
        arrays = _input_ids([document.text for document in documents], tokenizer)
        if self.control_tokens == "text" and any(spells):
            spelling = [index for index, is_spelt in enumerate(spells) if is_spelt]
            again = _input_ids([documents[index].text for index in spelling], tokenizer, split_special_tokens=True)
            for index, ids in zip(spelling, again, strict=True):
                arrays[index] = ids
        special = np.asarray(tokenizer.convert_tokens_to_ids(sorted(control_tokens(tokenizer))), dtype=np.int32)
        for document, ids, is_spelt in zip(documents, arrays, spells, strict=True):
            inner = ids[1:-1]  # the ends may be the tokenizer's BOS and EOS
            # Characters that the vocabulary lacks become its unknown token, which nobody spelled out.
            count = int((np.isin(inner, special) & (inner != tokenizer.unk_token_id)).sum()) if is_spelt else 0
            if is_spelt and not count:
                found.notes.counts[SPELT] += 1
            found.documents.append(TokenizedDocument(document.name, ids, num_special=count))
            self._decomposed.add(document, found.notes)
        return found


class DecomposedCost:
    """Measures how many tokens decomposed Unicode takes, as it is and composed, on enough of it to tell."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.left = DECOMPOSED_CHARS

    def add(self, document: Document, notes: ChatNotes) -> None:
        """Count the tokens of a document's decomposed texts."""
        for text in document.texts():
            part = text[: self.left]
            if not part.isascii() and (composed := unicodedata.normalize("NFC", part)) != part:
                self.left -= len(part)
                before, after = _input_ids([part, composed], self.tokenizer, add_special_tokens=False)
                notes.decomposed.update({"as it is": len(before), "composed": len(after)})


def _input_ids(texts: Sequence[Any], tokenizer: "PreTrainedTokenizerBase", **options: bool) -> list[np.ndarray]:
    with tokenizing(tokenizer):
        encoded = tokenizer(list(texts), verbose=False, **options)["input_ids"]
    return [np.asarray(ids, dtype=np.int32) for ids in encoded]
