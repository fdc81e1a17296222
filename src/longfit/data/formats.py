"""Rows of any common shape become text or chat messages; of a chat's tokens only the answers are trained.

| keys of the row                                       | known from           | becomes             |
|-------------------------------------------------------|----------------------|---------------------|
| `messages` [{role, content}]                          | OpenAI, TRL, Axolotl | chat                |
| `conversations` [{from, value}]                       | ShareGPT             | chat                |
| `instruction`, `output` (`input`, `system`, `history`) | Alpaca, LongAlpaca  | chat                |
| `prompt`, `completion`                                | OpenAI, TRL          | chat                |
| `question`, `answer` (`context`)                      | question sets        | chat, context first |
| `text`                                                | everyone             | text                |

The first line that fits wins. LongLoRA's supervised set (LongAlpaca) puts a whole document into `instruction`; nothing
special is needed for it. What this is not: a template language. The tokenizer's own chat template renders the messages,
and the trained spans are found by *rendering*, never by searching for marker strings.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from longfit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Row = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}

# ChatML whose turns end with the tokenizer's own end token, so that a base model without <|im_end|> learns to stop.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRAIN_TURNS = ("all", "last")


@dataclass(frozen=True, slots=True)
class RowShape:
    """One way to write a row: the keys that reveal it, and how its content is taken out."""

    name: str
    keys: tuple[str, ...]
    messages: Callable[[Row], list[Message]] | None  # None: plain text in the one key


def _from_messages(row: Row) -> list[Message]:
    return [dict(_as_mapping(turn)) for turn in _as_turns(row["messages"], "messages")]


def _from_sharegpt(row: Row) -> list[Message]:
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in _as_turns(row["conversations"], "conversations"):
        turn = _as_mapping(turn)
        if "from" not in turn:  # the OpenAI spelling under ShareGPT's key is common
            messages.append(dict(turn))
            continue
        if turn["from"] not in SHAREGPT_ROLES:
            raise DataError(f"unknown role {turn['from']!r} in 'from'; allowed: {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")})
    return messages


def _from_alpaca(row: Row) -> list[Message]:
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in row.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": row["output"]}]


def _from_prompt(row: Row) -> list[Message]:
    turns: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[key]
        turns += (
            [{"role": role, "content": value}]
            if isinstance(value, str) or value is None
            else _from_messages({"messages": value})
        )
    return turns


def _from_question(row: Row) -> list[Message]:
    prompt = "\n\n".join(part for part in (row.get("context"), row["question"]) if part)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["answer"]}]


SHAPES = (
    RowShape("messages", ("messages",), _from_messages),
    RowShape("sharegpt", ("conversations",), _from_sharegpt),
    RowShape("alpaca", ("instruction", "output"), _from_alpaca),
    RowShape("prompt-completion", ("prompt", "completion"), _from_prompt),
    RowShape("question-answer", ("question", "answer"), _from_question),
    RowShape("text", ("text",), None),
)


def recognise(keys: Collection[str], *, text_column: str | None = None) -> RowShape:
    """Tell the shape of a row from its keys.

    Args:
        keys: the row's keys.
        text_column: take this column as plain text, whatever else the row holds.
    Raises: DataError: no shape fits, or the named column is missing.
    """
    if text_column is not None:
        if text_column not in keys:
            raise DataError(f"text_column {text_column!r} is not among the columns {_listed(keys)}")
        return RowShape("text", (text_column,), None)
    for shape in SHAPES:
        if all(key in keys for key in shape.keys):
            return shape
    known = " | ".join("+".join(shape.keys) for shape in SHAPES)
    raise DataError(
        f"columns {_listed(keys)} are not recognised; known: {known}; "
        "or name the column that holds the text with text_column"
    )


def row_content(row: Row, shape: RowShape) -> str | tuple[Message, ...]:
    """Take the text or the checked messages out of a row. An empty or missing text is the empty string.

    Raises: DataError: a value of the wrong type, or a chat that cannot be trained on (see `check_messages`).
    """
    if shape.messages is None:
        value = row[shape.keys[0]]
        if value is not None and not isinstance(value, str):
            raise DataError(f"column {shape.keys[0]!r} holds {type(value).__name__}, not text")
        return value or ""
    return check_messages(shape.messages(row))


def check_messages(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Refuse a chat that nothing can be learned from, before any token is made.

    Returns: the messages, contents given as lists of text parts joined, keys without value removed.
    Raises: DataError: no turn, unknown role, content that is not text, no assistant turn or an empty one.
    """
    checked = []
    for number, message in enumerate(messages, start=1):
        if message.get("role") not in ROLES:
            raise DataError(f"turn {number}: unknown role {message.get('role')!r}; allowed: {', '.join(ROLES)}")
        message = {key: value for key, value in message.items() if value is not None}
        message["content"] = _content_text(message.get("content", ""), number)
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise DataError(f"turn {number}: the assistant's answer is empty; remove the row or fill it in")
        checked.append(message)
    if not any(message["role"] == "assistant" for message in checked):
        raise DataError(
            f"no assistant turn among {len(checked)} turns, so nothing to train on; remove the row or add the answer"
        )
    return tuple(checked)


def _content_text(content: object, number: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise DataError(f"turn {number}: content is {type(content).__name__}, not text; only text can be trained on")


def _as_turns(value: object, key: str) -> list[Any]:
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(
            f"column {key!r} holds {'an empty list' if value == [] else type(value).__name__}; expected a list of turns"
        )
    return list(value)


def _as_mapping(turn: object) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"a turn is {type(turn).__name__}, not an object with role and content")
    return turn


def _listed(keys: Collection[str]) -> str:
    return ", ".join(repr(key) for key in keys) or "(none)"


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A chat as tokens, and which of them the model is trained to say."""

    input_ids: np.ndarray  # int32 [N]
    trained: np.ndarray  # bool [N]


def chat_template(tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> str:
    """Choose the chat template: the one given ("chatml" for the built-in one, or Jinja text), else the tokenizer's own.

    Raises: ConfigError: the tokenizer has none, as base models do, and none was given.
    """
    if template == "chatml":
        return CHATML
    if template is not None:
        return template
    if not tokenizer.chat_template:
        raise ConfigError(
            "the data are chats, but this tokenizer has no chat template (a base model); "
            "set chat_template='chatml', give a Jinja template, or start from the instruct model"
        )
    return tokenizer.get_chat_template()


def encode_chat(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", *, template: str, train_turns: str = "all"
) -> EncodedChat:
    """Render a chat, tokenise it once, and mark the assistant's tokens (end-of-turn token included) as trained.

    Where the template has ``{% generation %}`` marks, they say what the assistant wrote. Elsewhere the span of a turn
    begins where the rendering of the turns before it, with the generation prompt, ends (exactly what the model will be
    given to answer), and ends where the rendering of the turns up to it ends. Both must be prefixes of the whole
    rendering, which is verified: templates that rewrite earlier turns (those that drop old reasoning) are refused
    rather than mislabelled.

    Args:
        messages: as `check_messages` returns them.
        template: Jinja text, from `chat_template`.
        train_turns: "all" assistant turns, or only the "last".
    Returns: token ids and trained mask, both ``[N]``.
    Raises: DataError: the template refuses the messages (with its line) or rewrites earlier turns; two BOS tokens;
        nothing to train.
    """
    if train_turns not in TRAIN_TURNS:
        raise ConfigError(f"train_turns {train_turns!r}: allowed are {', '.join(TRAIN_TURNS)}")
    marked = "{% generation" in template or "{%- generation" in template
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if marked and tokenizer.is_fast:
        encoded = _render(messages, tokenizer, template, tokenize=True, return_assistant_tokens_mask=True)
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        trained = np.asarray(encoded["assistant_masks"], dtype=bool)
        if train_turns == "last":
            trained &= np.arange(len(ids)) >= _last_run_start(trained)
        elif (found := int((np.diff(trained, prepend=False) & trained).sum())) < (expected := _num_answers(messages)):
            raise DataError(
                f"the template's {{% generation %}} marks cover {found} of {expected} answers; "
                "fix the template, or set train_turns='last'"
            )
    else:
        text = _render(messages, tokenizer, template, tokenize=False)
        spans = [
            _turn_span(text, messages, index, tokenizer, template)
            for index in turns[-1 if train_turns == "last" else 0 :]
        ]
        ids, trained = _mark_tokens(text, spans, tokenizer)
    bos = tokenizer.bos_token_id
    if len(ids) > 1 and ids[0] == ids[1] == bos and bos is not None:
        raise DataError(
            f"two {tokenizer.bos_token!r} tokens at the start; remove it from the first message or the template"
        )
    if not trained[1:].any():
        raise DataError("0 trained tokens: the template renders nothing of the assistant's answer")
    return EncodedChat(ids, trained)


def _render(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", template: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), chat_template=template, **options)
    except TemplateError as error:
        raise DataError(
            f"the chat template refuses this row (template line {_template_line(error)}): {error}"
        ) from None


def _template_line(error: TemplateError) -> int | str:
    """Find the template's line: Jinja rewrites its frames so that they carry it."""
    line: int | str = "unknown"
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _turn_span(
    text: str, messages: Sequence[Message], index: int, tokenizer: "PreTrainedTokenizerBase", template: str
) -> tuple[int, int]:
    """Find the characters of `text` that the assistant said in turn `index`."""
    if index == 0:
        raise DataError(
            "the chat begins with the assistant, so there is no prompt its first answer could follow; "
            "remove that turn or put a user turn before it"
        )
    before = _render(messages[:index], tokenizer, template, tokenize=False, add_generation_prompt=True)
    last = index == len(messages) - 1
    through = text if last else _render(messages[: index + 1], tokenizer, template, tokenize=False)
    for rendered in (before, through):
        if not text.startswith(rendered):
            raise DataError(
                f"the chat template rewrites turn {index + 1} when later turns follow, so its tokens cannot be told "
                "apart; set train_turns='last', or use a template with {% generation %} marks"
            )
    # The line break that many templates write after the end-of-turn token is never generated.
    stripped = through.rstrip()
    ends_with_special = any(stripped.endswith(token) for token in tokenizer.all_special_tokens)
    return len(before), len(stripped) if ends_with_special else len(through)


def _mark_tokens(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise once; a token is trained if it begins inside a span. One that straddles its start is not answer."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        starts = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
        trained = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            trained |= (starts >= start) & (starts < end)
        return ids, trained
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    trained = np.zeros(len(ids), dtype=bool)
    for span in spans:
        start, end = (_token_prefix(text[:position], ids, tokenizer) for position in span)
        trained[start:end] = True
    return ids, trained


def _token_prefix(prefix: str, ids: np.ndarray, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Count the tokens of a text prefix, verified to be a prefix of the tokens (for tokenizers without offsets)."""
    head = np.asarray(tokenizer(prefix, add_special_tokens=False)["input_ids"], dtype=np.int32)
    if not np.array_equal(head, ids[: len(head)]):
        raise DataError(
            "the answer's first or last characters share a token with the text around it, and this slow tokenizer "
            "cannot tell where; use a fast tokenizer (tokenizer.json)"
        )
    return len(head)


def _num_answers(messages: Sequence[Message]) -> int:
    """Count runs of assistant turns."""
    roles = ["", *(message["role"] for message in messages)]
    return sum(role == "assistant" != before for before, role in pairwise(roles))


def _last_run_start(mask: np.ndarray) -> int:
    """Index where the last run of True begins; len(mask) without one."""
    set_at = np.flatnonzero(mask)
    if not len(set_at):
        return len(mask)
    gaps = np.flatnonzero(np.diff(set_at) > 1)
    return int(set_at[gaps[-1] + 1] if len(gaps) else set_at[0])
