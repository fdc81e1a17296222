"""What a row says comes in many spellings and becomes one; a chat that teaches nothing is refused by name."""

from typing import Any

import pytest

from longfit.data.messages import read_chat, read_tools
from longfit.errors import DataError

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}


@pytest.mark.parametrize(
    ("turn", "read"),
    [
        ({"from": "human", "value": "q"}, QUESTION),
        ({"role": "User", "content": "q"}, QUESTION),
        ({"role": "model", "content": "a"}, ANSWER),
        ({"role": "user", "content": [{"type": "text", "text": "q"}], "name": None}, QUESTION),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, {**ANSWER, "content": "", "tool_calls": [CALL]}),
        (
            {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
            {**ANSWER, "content": "", "tool_calls": [{**CALL, "id": "c1"}]},
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {**ANSWER, "content": "", "tool_calls": [CALL]},
        ),
        (
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {**ANSWER, "content": "", "tool_calls": [CALL]},
        ),
        ({"from": "observation", "value": "r"}, {"role": "tool", "content": "r"}),
        ({"role": "function", "name": "f", "content": "r"}, {"role": "tool", "content": "r", "name": "f"}),
        ({**ANSWER, "thinking": "t"}, {**ANSWER, "reasoning_content": "t"}),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]},
            {**ANSWER, "reasoning_content": "t"},
        ),
    ],
)
def test_turns_of_every_spelling_become_one(turn: dict[str, Any], read: dict[str, Any]) -> None:
    assert read_chat([turn, QUESTION, ANSWER]).messages[0] == read


@pytest.mark.parametrize(
    ("said", "flag"),
    [({"weight": 0}, False), ({"weight": 1.0}, True), ({"train": False}, False), ({"loss": True}, True), ({}, None)],
)
def test_a_turn_may_say_whether_it_is_trained(said: dict[str, Any], flag: bool | None) -> None:
    chat = read_chat([QUESTION, {**ANSWER, **said}])
    assert chat.flags == (None, flag)
    assert chat.messages[1] == ANSWER


@pytest.mark.parametrize("value", [[TOOL], TOOL, [TOOL["function"]], str([TOOL]).replace("'", '"')])
def test_tool_schemas_of_every_spelling_become_one(value: Any) -> None:
    assert read_tools(value) == (TOOL,)
    assert read_tools(None) == read_tools("[]") == read_tools("") == read_tools([]) == ()


def test_null_arguments_of_other_tools_are_left_out() -> None:
    call = {"function": {"name": "f", "arguments": {"x": None, "zone": None, "city": "Hue"}}}
    chat = read_chat([QUESTION, {"role": "assistant", "tool_calls": [call]}], tools=[TOOL])
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": None, "city": "Hue"}


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([QUESTION], "no assistant turn among 1 turns"),
        ([QUESTION, {"role": "assistant", "content": " "}], "turn 2: the assistant's answer is empty"),
        ([{"role": "alice", "content": "x"}], "turn 1: unknown role 'alice'; allowed: system, developer, user"),
        ([{"content": "x"}], r"turn 1: a turn without a role \(it has content\); write role and content"),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url"}, {"type": "image_url"}, {"type": "text", "text": "b"}],
                }
            ],
            r"turn 1: content is list, not text: 2 parts are no text \(2 image_url\)",
        ),
        ([{"role": "user", "content": 2}, ANSWER], "turn 1: content is int, not text"),
        (["text"], "turn 1: a turn is str, not an object"),
        ([QUESTION, {**ANSWER, "weight": 0.5}], "turn 2: weight is 0.5; a turn is trained"),
        ([QUESTION, {**ANSWER, "weight": 0, "train": True}], "turn 2: train is True, which contradicts"),
        ([QUESTION, {"from": "function_call", "value": "{}"}], "turn 2: a tool call without a name"),
        ([QUESTION, {"from": "function_call", "value": "{"}], "turn 2: function_call: a text that is no JSON"),
        ([QUESTION, {**ANSWER, "reasoning": "a", "thinking": "b"}], "turn 2: reasoning must be one text"),
    ],
)
def test_chats_that_teach_nothing_are_refused(turns: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_chat(turns)
