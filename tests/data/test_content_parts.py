"""A turn in parts: texts, reasoning, calls and results of three makers; other parts are refused, the rest counted."""

from typing import Any

import pytest

from longfit.data.content_parts import as_text, read_parts, results_apart
from longfit.data.messages import read_chat
from longfit.errors import DataError

CALL = {"name": "weather", "arguments": {"city": "Oslo"}}


@pytest.mark.parametrize(
    ("asks", "gives"),
    [
        (
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}},
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "-4"}]},
        ),
        (
            {"functionCall": {"name": "weather", "args": {"city": "Oslo"}}},
            {"functionResponse": {"name": "weather", "response": "-4"}},
        ),
    ],
    ids=["anthropic", "gemini"],
)
def test_calls_and_results_in_parts_become_what_templates_read(asks: dict[str, Any], gives: dict[str, Any]) -> None:
    chat = read_chat(
        [
            {"role": "user", "content": "Oslo?"},
            {"role": "assistant", "content": [{"text": "I look."}, asks]},
            {"role": "user", "content": [gives, {"type": "text", "text": "And?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Cold."}]},
        ]
    )
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "user", "assistant"]
    assert [message["content"] for message in chat.messages] == ["Oslo?", "I look.", "-4", "And?", "Cold."]
    assert chat.messages[1]["tool_calls"][0]["function"] == CALL
    assert chat.messages[1]["tool_calls"][0].get("id") == chat.messages[2].get("tool_call_id")


def test_what_parts_and_calls_say_besides_is_kept_for_the_count_of_what_nothing_reads() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "abc"}
    call = {"function": {**CALL, "output": "-4"}, "result": "cold"}
    chat = read_chat(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": [thought], "tool_calls": [call]}]
    )
    answer = chat.messages[1]
    assert answer["reasoning_content"] == "hm"
    assert answer["content.signature"] == "abc"
    assert (answer["tool_calls.output"], answer["tool_calls.result"]) == ("-4", "cold")


def test_a_turn_of_results_alone_keeps_what_it_says_besides() -> None:
    turn = {"role": "user", "train": False, "content": [{"type": "tool_result", "content": "-4", "is_error": True}]}
    assert list(results_apart(turn, "content")) == [{"role": "tool", "train": False, "content": "-4", "is_error": True}]


def test_parts_that_are_no_text_are_refused_by_their_kind() -> None:
    parts = [{"type": "image_url", "image_url": {}}, {"inlineData": {}}, {"type": "text", "text": None}, 4]
    with pytest.raises(DataError, match=r"4 parts are no text \(1 image_url, 1 inlineData, 1 text, 1 int\)"):
        read_parts(parts)


def test_what_a_tool_gives_back_is_written_as_json_unless_it_is_text() -> None:
    assert as_text({"t": -4, "wo": "Tromsø"}) == '{"t": -4, "wo": "Tromsø"}'
    assert as_text([{"t": -4}]) == '[{"t": -4}]'
    assert as_text("-4") == "-4"
    assert as_text([{"type": "text", "text": "-4"}]) == [{"type": "text", "text": "-4"}]
