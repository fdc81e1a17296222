"""A row of a table becomes a text or a chat: known by its columns, or by the column map that the user gives.

| columns of the row                                                              | known from              | becomes |
|---------------------------------------------------------------------------------|-------------------------|---------|
| `messages` (or its JSON)                                                        | OpenAI, TRL, Axolotl    | chat    |
| `conversations`, `conversation`, `dialog`, `dialogue`, `chat`, `contents`       | ShareGPT, LLaMA-Factory | chat    |
| `instruction` and an answer column (`input`, `context`, `history`)              | Alpaca, LongAlpaca, Dolly | chat  |
| `prompt` and an answer column                                                   | OpenAI, TRL             | chat    |
| `question`, `query` or `problem` and an answer column (`context`)               | question sets           | chat    |
| `input` and an answer column                                                    | T5-like sets            | chat    |
| `text`                                                                          | everyone                | text    |

The first line that fits wins, with capitals or without; answer columns are `ANSWERS`, the first that is there. `system`
(or another of `SYSTEMS`) beside any of them is the system turn, `tools` or `functions` the tool schemas. Columns that
nothing reads are named in `Content.unread`. LongLoRA's supervised set (LongAlpaca) puts a whole document into
`instruction`; nothing special is needed for it.
"""

import json
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from longfit.data.messages import CONTENT_KEYS, Chat, read_chat
from longfit.errors import ConfigError, DataError

Row = dict[str, Any]
Turn = dict[str, Any]

TURN_LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "contents")
QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "input")
ANSWERS = ("output", "completion", "response", "answer", "solution")
TOOLS = ("tools", "functions")
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction", "systemInstruction")
PREFERENCES = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
LIKE_QUESTIONS = ("article", "document", "source", "user", "human", "ask", "input")
LIKE_ANSWERS = ("answers", "summary", "highlights", "target", "reply", "assistant", "gpt")
MAPPED = ("text", "messages", "prompt", "answer", "context", "system", "tools")  # what a column map may name
NAMES = {  # of the layouts, as errors call them
    "messages": "messages",
    "instruction": "alpaca",
    "prompt": "prompt-completion",
    "question": "question-answer",
    "query": "question-answer",
    "problem": "question-answer",
    "input": "input-output",
}


@dataclass(frozen=True, slots=True)
class ColumnLayout:
    """One way to write a row, and which of its columns are read."""

    name: str
    reads: tuple[str, ...]
    turns: Callable[[Row], list[Any]] | None  # None: plain text in the first column read
    columns: Mapping[str, str] | None = None  # our name -> the file's name


@dataclass(frozen=True, slots=True)
class Content:
    """What a row holds, and the columns that say something nobody reads."""

    text: str | None
    chat: Chat | None
    unread: tuple[str, ...] = ()


def recognise(
    keys: Collection[str], *, text_column: str | None = None, columns: Mapping[str, str] | None = None
) -> ColumnLayout:
    """Tell the layout of a row from its columns.

    Args:
        keys: the row's columns.
        text_column: take this column as plain text, whatever else the row holds.
        columns: a map from `MAPPED` names to the row's columns.
    Raises: DataError: no layout fits, or a named column is missing. ConfigError: the map names something unknown.
    """
    if text_column is not None:
        columns = {"text": text_column}
    if columns:
        return _mapped(keys, columns)
    if found := _known(keys):
        return found
    small = {key.lower(): key for key in keys}
    if len(small) == len(keys) and (found := _known(small)):
        return replace(found, columns={name: small[name] for name in found.reads if name in small})
    for preferred, other in PREFERENCES:
        if preferred in small and other in small:
            raise DataError(
                f"columns {_listed(keys)} hold a preference, and longfit trains on answers: to train on those in "
                f"{small[preferred]!r}, name them: {_preferred(small, small[preferred])}"
            )
    raise DataError(
        f"columns {_listed(keys)} are not recognised; known: {_known_layouts()}, where ANSWER is "
        f"{' or '.join(ANSWERS)}. {_column_map(keys)}"
    )


def _known(keys: Collection[str]) -> ColumnLayout | None:
    """The first layout that the columns fit."""
    for key in TURN_LISTS:
        if key in keys:
            name = "messages" if key == "messages" else "sharegpt"
            return ColumnLayout(name, (key, *SYSTEMS, *TOOLS), partial(_listed_turns, key=key))
    answer = next((key for key in ANSWERS if key in keys), None)
    for key in QUESTIONS:
        if key in keys and answer is not None:
            beside = ("context", "input") if key == "instruction" else ("context",)
            reads = (key, answer, *SYSTEMS, "history", *beside, *TOOLS)
            return ColumnLayout(NAMES[key], reads, partial(_pair_turns, question=key, answer=answer))
    return ColumnLayout("text", ("text",), None) if "text" in keys else None


def _known_layouts() -> str:
    return " | ".join([TURN_LISTS[0], TURN_LISTS[1], *(f"{key}+ANSWER" for key in QUESTIONS), "text"])


def _column_map(keys: Collection[str]) -> str:
    """Offer to name the row's columns, with those that look like a question and an answer."""
    names = list(keys)
    if len(names) < 2:
        text = f"data.text_column={shlex.quote(names[0])}" if names else "data.text_column=COLUMN"
        return f"If it is plain text, name its column: {text}"
    asked = next((name for name in names if name.lower() in (*QUESTIONS, *LIKE_QUESTIONS)), names[0])
    said = next((name for name in names if name.lower() in (*ANSWERS, *LIKE_ANSWERS) and name != asked), None)
    said = said or next(name for name in names if name != asked)
    pair = ", ".join(f"{ours}: {_quoted(theirs)}" for ours, theirs in (("prompt", asked), ("answer", said)))
    return (
        f"Name yours with a column map, such as data.columns='{{{pair}}}', or data.text_column={shlex.quote(names[0])}"
    )


def _preferred(small: Mapping[str, str], preferred: str) -> str:
    """The column map that trains on the preferred answers, which are answers alone or chats with their prompt."""
    asked = next((small[name] for name in QUESTIONS if name in small), None)
    named = (
        f"messages: {_quoted(preferred)}"
        if asked is None
        else f"prompt: {_quoted(asked)}, answer: {_quoted(preferred)}"
    )
    return f"data.columns='{{{named}}}'"


def _quoted(name: str) -> str:
    """A name as YAML takes it inside braces and single quotes of a shell."""
    return name if re.fullmatch(r"[A-Za-z_][\w.-]*", name) else json.dumps(name, ensure_ascii=False)


def read_row(row: Row, layout: ColumnLayout) -> Content:
    """Take the text or the checked chat out of a row. An empty or missing text is the empty string.

    Raises: DataError: a value of the wrong type, or a chat that cannot be trained on (see `read_chat`).
    """
    renamed = row
    if layout.columns:
        renamed = {ours: row.get(theirs) for ours, theirs in layout.columns.items()}
        read = frozenset(layout.columns.values())
    else:
        read = frozenset(layout.reads)
    unread = tuple(key for key, value in row.items() if key not in read and value not in (None, "", [], {}))
    if layout.turns is None:
        value = renamed[layout.reads[0]]
        if value is not None and not isinstance(value, str):
            named = (layout.columns or {}).get(layout.reads[0], layout.reads[0])
            raise DataError(f"column {named!r} holds {_no_text(value)}")
        return Content(value or "", None, unread)
    system, *_ = systems = [key for key in SYSTEMS if renamed.get(key)] or [""]
    tools, *_ = schemas = [key for key in TOOLS if renamed.get(key)] or [""]
    unread += tuple(key for key in systems[1:] if renamed[key] != renamed[system])
    unread += tuple(key for key in schemas[1:] if renamed[key] != renamed[tools])
    turns = _with_system(renamed.get(system), layout.turns(renamed))
    return Content(None, read_chat(turns, tools=renamed.get(tools)), unread)


def _mapped(keys: Collection[str], columns: Mapping[str, str]) -> ColumnLayout:
    if unknown := [name for name in columns if name not in MAPPED]:
        raise ConfigError(f"data.columns: unknown name {unknown[0]!r}; allowed are {', '.join(MAPPED)}")
    for name, column in columns.items():
        if column not in keys:
            setting = f"text_column {column!r}" if name == "text" else f"data.columns: {name}: {column!r}"
            raise DataError(f"{setting} is not among the columns {_listed(keys)}")
    reads = tuple(columns)
    if "text" in columns:
        return ColumnLayout("text", ("text",), None, columns)
    if "messages" in columns:
        return ColumnLayout("messages", reads, partial(_listed_turns, key="messages"), columns)
    if "prompt" in columns and "answer" in columns:
        return ColumnLayout(
            "prompt-completion", reads, partial(_pair_turns, question="prompt", answer="answer"), columns
        )
    raise ConfigError("data.columns: name the text, the messages, or prompt and answer")


def _listed_turns(row: Row, key: str) -> list[Any]:
    value = row[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            raise DataError(f"column {key!r} holds str; expected a list of turns, or its JSON") from None
    if not isinstance(value, (list, tuple)) or not value:
        held = "an empty list" if value == [] else type(value).__name__
        raise DataError(f"column {key!r} holds {held}; expected a list of turns")
    return list(value)


def _pair_turns(row: Row, question: str, answer: str) -> list[Any]:
    """Turns of a question and its answer; either may be a list of turns itself."""
    history = row.get("history") or []
    turns: list[Any] = []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise DataError(f"history holds {pair!r:.40}; expected pairs of a question and its answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked, said = row[question], row[answer]
    for name, value in ((question, asked), (answer, said)):
        if isinstance(value, (list, tuple)) and not all(isinstance(turn, dict) for turn in value):
            raise DataError(f"column {name!r} holds several values, not a text or a list of turns; keep one of them")
    if isinstance(asked, (list, tuple)):
        turns += asked
    else:
        before = row.get("context") if question != "instruction" else None
        after = [row.get("context"), row.get("input")] if question == "instruction" else []
        parts = [before, asked, *after]
        for name, part in zip(("context", question, "context", "input"), parts, strict=False):
            if part is not None and not isinstance(part, str):
                raise DataError(f"column {name!r} holds {_no_text(part)}")
        turns.append({"role": "user", "content": "\n\n".join(part for part in parts if part)})
    if isinstance(said, (list, tuple)):
        turns += said
    elif said is not None and not isinstance(said, str):
        raise DataError(f"column {answer!r} holds {_no_text(said)}")
    else:
        turns.append({"role": "assistant", "content": said})
    return turns


def _with_system(system: object, turns: list[Any]) -> list[Any]:
    """Put what a `system` column says before the turns: a text, parts of one, or a turn."""
    if not system:
        return turns
    if isinstance(system, dict):
        system = next((system[key] for key in CONTENT_KEYS if system.get(key)), system)
    if not isinstance(system, str | list):
        raise DataError(f"column 'system' holds {_no_text(system)}")
    first = turns[0] if isinstance(turns[0], dict) else {}
    if first.get("role", first.get("from")) == "system":
        if first.get("content", first.get("value")) == system:
            return turns
        raise DataError("a system column and another system turn; keep one of them")
    return [{"role": "system", "content": system}, *turns]


def _no_text(value: object) -> str:
    """What a column holds in place of a text, and what to do."""
    return f"{type(value).__name__}, not text" + '; write it as a text, such as "4"' * isinstance(value, int | float)


def _listed(keys: Collection[str]) -> str:
    return ", ".join(repr(key) for key in keys) or "(none)"
