"""Rows of every common shape become the same turns; what no column map and no shape reads is named."""

import json
from typing import Any

import pytest

from longfit.data.layouts import read_row, recognise
from longfit.errors import ConfigError, DataError

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"messages": [QUESTION, ANSWER]}, "messages", [QUESTION, ANSWER]),
        ({"messages": json.dumps([QUESTION, ANSWER])}, "messages", [QUESTION, ANSWER]),
        ({"messages": [QUESTION, ANSWER], "system": "s"}, "messages", [SYSTEM, QUESTION, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "sharegpt",
            [SYSTEM, QUESTION, ANSWER],
        ),
        ({"conversations": [QUESTION, ANSWER]}, "sharegpt", [QUESTION, ANSWER]),
        ({"dialog": [QUESTION, ANSWER]}, "sharegpt", [QUESTION, ANSWER]),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [QUESTION, ANSWER]),
        ({"instruction": "q", "response": "a"}, "alpaca", [QUESTION, ANSWER]),
        (
            {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]]},
            "alpaca",
            [QUESTION, ANSWER, {"role": "user", "content": "q\n\ni"}, ANSWER],
        ),
        ({"prompt": "q", "completion": "a", "system": "s"}, "prompt-completion", [SYSTEM, QUESTION, ANSWER]),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, "prompt-completion", [QUESTION, ANSWER]),
        ({"query": "q", "response": "a"}, "question-answer", [QUESTION, ANSWER]),
        ({"problem": "q", "solution": "a"}, "question-answer", [QUESTION, ANSWER]),
        (
            {"question": "q", "answer": "a", "context": "book"},
            "question-answer",
            [{"role": "user", "content": "book\n\nq"}, ANSWER],
        ),
        ({"input": "q", "output": "a"}, "input-output", [QUESTION, ANSWER]),
    ],
)
def test_rows_of_every_shape_become_turns(row: dict[str, Any], name: str, messages: list[dict[str, str]]) -> None:
    layout = recognise(row)
    assert layout.name == name
    content = read_row(row, layout)
    assert content.chat is not None
    assert list(content.chat.messages) == messages
    assert content.unread == ()


def test_tools_beside_a_chat_are_read_and_other_columns_are_named() -> None:
    row = {"question": "q", "answer": "a", "tools": '[{"name": "f"}]', "id": 1, "note": None, "difficulty": "hard"}
    content = read_row(row, recognise(row))
    assert content.chat is not None
    assert [tool["function"]["name"] for tool in content.chat.tools] == ["f"]
    assert content.unread == ("id", "difficulty")


def test_a_column_map_names_what_no_shape_fits() -> None:
    row = {"ask": "q", "say": "a", "about": "book", "messages": "other"}
    columns = {"prompt": "ask", "answer": "say", "context": "about"}
    content = read_row(row, recognise(row, columns=columns))
    assert content.chat is not None
    assert [message["content"] for message in content.chat.messages] == ["book\n\nq", "a"]
    assert content.unread == ("messages",)
    with pytest.raises(DataError, match=r"prompt: 'asked' is not among the columns 'ask'"):
        recognise(row, columns={"prompt": "asked", "answer": "say"})
    with pytest.raises(ConfigError, match="name the text, the messages, or prompt and answer"):
        recognise(row, columns={"prompt": "ask"})
    with pytest.raises(DataError, match=r"columns 'ask', .* are not recognised; known: messages .*data\.columns="):
        recognise(["ask", "say"])


def test_text_rows_and_named_columns_become_text() -> None:
    content = read_row({"text": "x", "id": 1}, recognise({"text", "id"}))
    assert (content.text, content.unread) == ("x", ("id",))
    named = recognise(["body", "messages"], text_column="body")
    assert read_row({"body": None}, named).text == ""
    with pytest.raises(DataError, match=r"text_column 'txt' is not among the columns 'body'"):
        recognise(["body"], text_column="txt")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "column 'messages' holds an empty list"),
        ({"messages": "text"}, "column 'messages' holds str; expected a list of turns"),
        ({"instruction": 5, "output": "o"}, "column 'instruction' holds int, not text"),
        ({"instruction": "q", "output": "a", "history": ["q", "a", "c"]}, "history holds 'q'; expected pairs"),
        ({"messages": [SYSTEM, QUESTION, ANSWER], "system": "other"}, "a system column and another system turn"),
        ({"text": 1}, "column 'text' holds int, not text"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_row(row, recognise(row))
