"""A chat in one spelling, whatever its row called things: turns, tool calls, tool schemas, and which turns are trained.

| said in a row as                                                        | becomes                                    |
|-------------------------------------------------------------------------|--------------------------------------------|
| `role`, `from` or `speaker`; human, gpt, AI, User, observation, ...     | one of `ROLES`                             |
| `content`, `value`, `text` or `parts`; a text, or parts                 | `content`, a text (`content_parts.py`)     |
| `{"human": ..., "assistant": ...}`, roles as keys                       | a turn for each                            |
| `tool_calls` (a list or its JSON), `function_call`, such a turn         | `tool_calls` [{function: {...}}]           |
| `reasoning_content`, `reasoning`, `thinking`                            | `reasoning_content`                        |
| `weight`, `train`, `loss`, `loss_mask`, `trainable`, `training`         | `Chat.flags`: True, False, or None unsaid  |

Everything else a turn says stays in it under its own key: a template may read it, and where none does, that is counted
(`provenance.py`). What this is not: it renders nothing (`template.py`) and knows no columns (`layouts.py`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longfit.data.content_parts import REASONING_KEYS, as_text, read_parts, results_apart
from longfit.errors import DataError

Message = dict[str, Any]
Tool = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_NAMES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "prompter": "user",
    **dict.fromkeys(("function", "observation", "tool_response", "tool_result", "function_response"), "tool"),
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALL_TURNS = frozenset({"function_call", "tool_call"})  # turns whose text is the JSON of a call
FLAG_KEYS = ("weight", "train", "loss", "loss_mask", "trainable", "training")
FLAG_TEXTS = {"0": 0, "1": 1, "false": 0, "true": 1}  # as tables write them
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text", "parts")
ARGUMENT_KEYS = ("arguments", "parameters", "input", "args")
SCHEMA_KEYS = ("input_schema", "inputSchema")  # Anthropic's and MCP's word for parameters
CALL_PLUMBING = frozenset({"id", "type", "index", "function"})


@dataclass(frozen=True, slots=True)
class Chat:
    """A checked conversation.

    `flags` has an entry a turn: whether its row says that it is trained (True), is not (False), or neither (None).
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    flags: tuple[bool | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.flags:
            object.__setattr__(self, "flags", (None,) * len(self.messages))

    def said(self) -> list[Any]:
        """Everything that distinguishes this chat from another, as JSON takes it."""
        return [self.messages, self.tools, self.flags]


def read_chat(turns: Sequence[object], *, tools: object = None) -> Chat:
    """Bring the turns of a row into one spelling, and refuse a chat that nothing can be learned from.

    Args:
        turns: objects with a role and something said.
        tools: schemas as a list, one object, or JSON of either; None and [] for none.
    Raises: DataError: a turn that is no object, an unknown role, content that is not text, a call without a name,
        an empty answer, no answer at all.
    """
    schemas = read_tools(tools)
    messages, flags = [], []
    for number, turn in enumerate(_one_role_each(turns), start=1):
        try:
            message, flag = _read_turn(turn)
        except DataError as error:
            raise DataError(f"turn {number}: {error}") from None
        messages.append(message)
        flags.append(flag)
    for number, (message, flag) in enumerate(zip(messages, flags, strict=True), start=1):
        says = message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")
        if message["role"] == "assistant" and not says and flag is not False:
            raise DataError(f"turn {number}: the assistant's answer is empty; remove the row or fill it in")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"no assistant turn among {len(messages)} turns, so nothing to train on; remove the row or add the answer"
        )
    _drop_undeclared_nulls(messages, schemas)
    return Chat(tuple(messages), schemas, tuple(flags))


def read_tools(value: object) -> tuple[Tool, ...]:
    """Read tool schemas in any of their spellings; each becomes ``{"type": "function", "function": {...}}``.

    Raises: DataError: not JSON, or not objects with a name.
    """
    value = _parsed(value, "tools")
    if value is None or value == {}:
        return ()
    schemas = []
    for number, tool in enumerate(value if isinstance(value, list) else [value], start=1):
        tool = _parsed(tool, f"tool {number}")
        if not isinstance(tool, dict):
            raise DataError(f"tool {number} is {type(tool).__name__}, not an object with a name and parameters")
        inner = tool.get("function", tool)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise DataError(f'tool {number} has no name; write {{"type": "function", "function": {{"name": ...}}}}')
        words = {key: "parameters" for key in SCHEMA_KEYS if "parameters" not in inner}
        inner = {words.get(key, key): item for key, item in inner.items()}
        inner = {key: _parsed(item, key) if key == "parameters" else item for key, item in inner.items()}
        rest = {key: item for key, item in tool.items() if key != "function"} if "function" in tool else {}
        schemas.append({"type": "function", **rest, "function": inner})
    return tuple(schemas)


def _one_role_each(turns: Sequence[object]) -> list[object]:
    """Take apart turns that are written under their roles, ``{"human": "...", "assistant": "..."}``, and results."""
    apart: list[object] = []
    for turn in turns:
        if isinstance(turn, dict) and turn and all(isinstance(key, str) and _role(key) in ROLE_NAMES for key in turn):
            apart += [{"role": role, "content": said} for role, said in turn.items() if said is not None]
        elif isinstance(turn, dict):
            turn = _in_small_letters(turn)
            apart += results_apart(turn, _content_key(turn))
        else:
            apart.append(turn)
    return apart


def _in_small_letters(turn: dict[str, Any]) -> dict[str, Any]:
    """Know ``Role`` and ``Content`` for what they are, where no key says it in small letters."""
    small = {str(key).lower(): value for key, value in turn.items()}
    known = any(key in turn for key in ROLE_KEYS)
    return turn if known or len(small) < len(turn) or not any(key in small for key in ROLE_KEYS) else small


def _content_key(turn: Mapping[str, Any]) -> str:
    return next((key for key in CONTENT_KEYS if turn.get(key) is not None), "content")


def _role(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _read_turn(turn: object) -> tuple[Message, bool | None]:
    if not isinstance(turn, dict):
        raise DataError(f"a turn is {type(turn).__name__}, not an object with role and content")
    turn = {key: value for key, value in turn.items() if value is not None}
    role_key = next((key for key in ROLE_KEYS if key in turn), None)
    if role_key is None:
        raise DataError(f"a turn without a role (it has {', '.join(turn) or 'nothing'}); write role and content")
    said_role = turn.pop(role_key)
    name = _role(said_role) if isinstance(said_role, str) else ""
    if name not in ROLE_NAMES:
        raise DataError(f"unknown role {said_role!r}; allowed: {', '.join(ROLE_NAMES)}")
    message: Message = {"role": ROLE_NAMES[name]}
    content = turn.pop(_content_key(turn), "")
    calls = _parsed(turn.pop("tool_calls", None), "tool_calls") or []
    if "function_call" in turn:
        calls = [turn.pop("function_call"), *calls]
    if name in CALL_TURNS:
        found = _parsed(content, name)
        calls, content = [*(found if isinstance(found, list) else [found]), *calls], ""
    if message["role"] == "tool":
        content = as_text(content)
    if isinstance(content, list):
        parts = read_parts(content)
        message["content"] = "".join(parts.texts)
        calls = [*calls, *parts.calls] if isinstance(calls, list) else calls
        turn |= parts.others
    elif isinstance(content, str):
        parts, message["content"] = read_parts([]), content
    else:
        raise DataError(f"content is {type(content).__name__}, not text; only text can be trained on")
    thoughts = ["".join(parts.thoughts), *(turn.pop(key, None) for key in REASONING_KEYS)]
    thoughts = [text for text in thoughts if text]
    if any(not isinstance(text, str) or text != thoughts[0] for text in thoughts):
        raise DataError(f"reasoning must be one text; the turn gives {len(thoughts)} under {', '.join(REASONING_KEYS)}")
    if thoughts:
        message["reasoning_content"] = thoughts[0]
    if not isinstance(calls, list):
        raise DataError(f"tool_calls is {type(calls).__name__}, not a list of calls")
    if calls:
        message["tool_calls"] = [_read_call(call, turn) for call in calls]
    flag = _read_flags(turn)
    return {**message, **turn}, flag


def _read_call(said: object, turn: Message) -> dict[str, Any]:
    """Bring a call into the form that chat templates read: arguments as an object, not as its JSON.

    What it says beside its name and arguments goes into the turn, so that it is counted as what no template reads.
    """
    call: Any = _parsed(said, "a tool call")
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise DataError('a tool call without a name; write {"name": ..., "arguments": {...}}')
    key = next((key for key in ARGUMENT_KEYS if inner.get(key) is not None), "arguments")
    arguments = inner.get(key)
    if isinstance(arguments, str):
        parsed = _parsed(arguments, "arguments", strict=False)
        arguments = parsed if isinstance(parsed, dict) else arguments
    for other, value in {**call, **inner}.items():
        if other not in ("name", key) and other not in CALL_PLUMBING and value not in (None, "", [], {}):
            turn[f"tool_calls.{other}"] = value
    kept = ("id", "type", "index") if "function" in call else ("id",)
    rest = {other: call[other] for other in kept if call.get(other) is not None}
    return {"type": "function", **rest, "function": {"name": inner["name"], "arguments": arguments or {}}}


def _read_flags(turn: Message) -> bool | None:
    """Take a turn's own word on whether it is trained out of it."""
    flag: bool | None = None
    for key in FLAG_KEYS:
        if key not in turn:
            continue
        value = turn.pop(key)
        value = FLAG_TEXTS.get(value.strip().lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"{key} is {value!r}; a turn is trained (1, true) or not (0, false), nothing between")
        if flag is not None and flag != bool(value):
            raise DataError(f"{key} is {value!r}, which contradicts another of {', '.join(FLAG_KEYS)}")
        flag = bool(value)
    return flag


def _drop_undeclared_nulls(messages: Sequence[Message], tools: Sequence[Tool]) -> None:
    """Remove null arguments that a called tool does not have: a table's schema added them, for other tools."""
    declared: dict[str, Mapping[str, object]] = {}
    for tool in tools:
        parameters = tool["function"].get("parameters")
        if isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict):
            declared[tool["function"]["name"]] = parameters["properties"]
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if function["name"] in declared and isinstance(function["arguments"], dict):
                known = declared[function["name"]]
                function["arguments"] = {
                    key: value for key, value in function["arguments"].items() if value is not None or key in known
                }


def _parsed(value: object, what: str, *, strict: bool = True) -> Any:
    """Parse JSON given as a text; anything else is returned as it is."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        if not strict:
            return value
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise DataError(f"{what}: a text that is no JSON ({reason})") from None
