"""One document: its texts, its characters and the digest that tells it from others."""

import pytest

from longfit.data.document import Document
from longfit.data.messages import read_chat
from longfit.errors import DataError

TURNS = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "Five."}]


def test_a_document_says_its_text_or_its_turns() -> None:
    text, chat = Document("a", text="đẹp"), Document("b", chat=read_chat(TURNS))
    assert (list(text.texts()), text.num_chars(), text.is_chat, text.messages) == (["đẹp"], 3, False, None)
    assert (list(chat.texts()), chat.num_chars(), chat.is_chat) == (["what?", "Five."], 10, True)


def test_equal_contents_have_one_digest_wherever_they_come_from() -> None:
    assert Document("a:1", text="x", source="a", line=1).fingerprint() == Document("b", text="x").fingerprint()
    assert Document("a", text="x").fingerprint() != Document("a", text="y").fingerprint()
    assert Document("a", chat=read_chat(TURNS)).fingerprint() == Document("b", chat=read_chat(TURNS)).fingerprint()
    reasoned = [TURNS[0], {**TURNS[1], "reasoning_content": "hmm"}]
    assert Document("a", chat=read_chat(TURNS)).fingerprint() != Document("a", chat=read_chat(reasoned)).fingerprint()


def test_half_a_character_is_refused_with_its_place() -> None:
    with pytest.raises(DataError, match=r"a: half a character, '\\ud83d', at 2"):
        Document("a", text="x \ud83d").fingerprint()
