"""One template and one choice of what is trained, over many chats."""

from datetime import datetime
from typing import Any

import pytest
from tests.data.chat_templates import SHAPES
from tests.data.chats import CHATS, says, tokenize, trained_text, user
from transformers import PreTrainedTokenizerFast

from longfit.data.template import choose_template
from longfit.errors import ConfigError, DataError


def test_a_day_that_a_template_prints_is_held(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    shape, tokenizer = SHAPES["Llama-3"], tokenizers["Llama-3"]
    turns = CHATS["single"][0]
    held = [tokenize(turns, shape, tokenizer, date=day)[0].input_ids.tolist() for day in ("2026-01-31", "2026-02-28")]
    assert "Today Date: 31 Jan 2026" in tokenizer.decode(held[0])
    assert held[0] != held[1]
    now = choose_template(tokenizer).render(turns)
    assert f"{datetime.now():%Y}" in now


def test_flags_choose_what_is_trained(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    shape, tokenizer = SHAPES["ChatML (SmolLM2)"], tokenizers["ChatML (SmolLM2)"]
    turns = [user("a"), says("b", weight=0), user("c"), says("d", weight=1), user("e"), says("f")]

    def trained(train_on: str, chat: list[dict[str, Any]] = turns) -> list[str]:
        return trained_text(tokenize(chat, shape, tokenizer, train_on=train_on), tokenizer)

    assert trained("all") == ["d<|im_end|>", "f<|im_end|>"]
    assert trained("last") == ["f<|im_end|>"]
    assert trained("marked") == ["d<|im_end|>"]
    with pytest.raises(DataError, match="no answer is marked as trained"):
        trained("marked", CHATS["single"][0])
    with pytest.raises(DataError, match="every answer is marked as not trained"):
        trained("all", turns[:2])
    with pytest.raises(ConfigError, match=r"data\.train_on 'first': allowed are all, last, marked"):
        trained("first")


def test_keys_that_no_template_reads_are_counted(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    shape, tokenizer = SHAPES["ChatML (SmolLM2)"], tokenizers["ChatML (SmolLM2)"]
    turns = [{**user("a"), "name": "bob", "id": 7}, says("b", name="", ok=True)]
    assert dict(tokenize(turns, shape, tokenizer).notes.unread) == {"name": 1, "id": 1, "ok": 1}
    reads = shape.template.replace("{{ m.content }}", "{{ m.name or '' }}{{ m.content }}")
    assert dict(tokenize(turns, shape, tokenizer, template=reads).notes.unread) == {"id": 1, "ok": 1}


def test_developer_turns_and_answers_without_a_question(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    shape, tokenizer = SHAPES["ChatML (SmolLM2)"], tokenizers["ChatML (SmolLM2)"]
    found = tokenize([{"role": "developer", "content": "d"}, user("a"), says("b")], shape, tokenizer)
    assert "<|im_start|>system\nd<|im_end|>" in tokenizer.decode(found[0].input_ids)
    found = tokenize([says("hello"), user("a"), says("b")], shape, tokenizer)
    assert trained_text(found, tokenizer) == ["b<|im_end|>"]
    assert any("begin with the assistant" in note for note in found.notes.counts)
    with pytest.raises(DataError, match="the chat begins with the assistant"):
        tokenize([says("hello"), user("a")], shape, tokenizer)
