"""What a turn says in parts: texts, reasoning, calls and their results, as OpenAI, Anthropic and Gemini write them.

| part                                                              | becomes                                     |
|-------------------------------------------------------------------|---------------------------------------------|
| `{"type": "text", "text": ...}`, `input_text`, `output_text`; `{"text": ...}` | text of the turn         |
| `{"type": "thinking", "thinking": ...}`, `reasoning`              | its reasoning                               |
| `{"type": "tool_use", "name", "input"}`, `{"functionCall": ...}`  | a call                                      |
| `{"type": "tool_result", "content"}`, `{"functionResponse": ...}` | a turn of its own, of the role tool         |

Everything else is no text and refused by name. What a part says beside that is handed back, so that it is counted.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from longfit.errors import DataError

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
CALL_PARTS = frozenset({"tool_use", "functionCall", "function_call"})
RESULT_PARTS = frozenset({"tool_result", "functionResponse", "function_response"})


@dataclass(slots=True)
class Parts:
    """A content in parts: its text, its reasoning, its calls, and what else its parts say, by key."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    others: dict[str, Any] = field(default_factory=dict)


def read_parts(content: Sequence[object]) -> Parts:
    """Sort the parts of a content.

    Raises: DataError: parts that are no text, each kind with its count.
    """
    found = Parts()
    strange: Counter[str] = Counter()
    for part in content:
        kind = _kind(part)
        said = part if isinstance(part, dict) else {}
        if kind in TEXT_PARTS and isinstance(said.get("text"), str):
            found.texts.append(said["text"])
            read = {"text"}
        elif kind in REASONING_KEYS and isinstance(said.get(kind, said.get("text")), str):
            found.thoughts.append(str(said.get(kind, said.get("text"))))
            read = {kind, "text"}
        elif kind in CALL_PARTS:
            found.calls.append(said.get(kind, {key: value for key, value in said.items() if key != "type"}))
            read = set(said) if kind == "tool_use" else {kind}
        else:
            strange[kind] += 1
            continue
        found.others |= {
            f"content.{key}": value
            for key, value in said.items()
            if key not in read | {"type"} and value not in (None, "", [], {})
        }
    if strange:
        named = ", ".join(f"{count} {kind}" for kind, count in strange.items())
        total = sum(strange.values())
        raise DataError(
            f"content is list, not text: {total} part{'s are' if total > 1 else ' is'} no text ({named}); "
            "only text can be trained on"
        )
    return found


def results_apart(turn: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    """Make a turn of each result of a call that stands among the parts of a turn; what is around it stays the turn's.

    Args:
        key: under which the turn has its content.
    """
    content = turn.get(key)
    if not isinstance(content, list) or not any(_kind(part) in RESULT_PARTS for part in content):
        yield turn
        return
    beside = {name: value for name, value in turn.items() if name not in (key, "role", "from", "speaker")}
    for is_result, parts in groupby(content, key=lambda part: _kind(part) in RESULT_PARTS):
        if is_result:
            yield from ({**beside, **_result(part)} for part in parts)
        else:
            yield {**turn, key: list(parts)}


def _result(part: dict[str, Any]) -> dict[str, Any]:
    kind = _kind(part)
    inner = part.get(kind, part)
    inner = inner if isinstance(inner, dict) else {"content": inner}
    said = {key: value for key, value in inner.items() if key not in ("type", "tool_use_id", "response")}
    if "response" in inner:
        said["content"] = inner["response"]
    if "tool_use_id" in inner:
        said["tool_call_id"] = inner["tool_use_id"]
    return {"role": "tool", "content": "", **said}


def as_text(content: object) -> object:
    """Write what a tool gave back as JSON, where it is neither a text nor parts of one."""
    is_parts = isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    if isinstance(content, str) or (is_parts and content):
        return content
    return json.dumps(content, ensure_ascii=False, default=str)


def _kind(part: object) -> str:
    """What a part is, by its type, or by its one telling key."""
    if not isinstance(part, dict):
        return type(part).__name__
    if "type" in part:
        return str(part["type"])
    telling = [*CALL_PARTS, *RESULT_PARTS, "text"]
    return next((key for key in telling if key in part), next(iter(map(str, part)), "nothing"))
