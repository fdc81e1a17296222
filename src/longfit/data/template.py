"""A chat template: Jinja text that turns messages into the text a model reads, with the day it may print held fixed.

The environment is the one that transformers renders with (sandboxed, blocks trimmed, `tojson` without HTML escapes,
`raise_exception`, `strftime_now`, the `{% generation %}` tag), so the same template gives the same text; a test
compares them. It is made here because a run needs what transformers does not offer: a date that a resumed run sees
again, the words the template itself knows, and where its generation marks lie in the text.

What this is not: it does not know which tokens are trained (`encoding.py`).
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import TemplateError, nodes

from longfit.data.messages import Message, Tool
from longfit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ChatML with tools as Qwen and Hermes write them. Turns end with the tokenizer's own end token, so that a base model
# without <|im_end|> learns to stop.
CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- 'You may call these functions:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\nA call is written as JSON: <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>' }}
{{- eos_token + '\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- eos_token }}
{%- endgeneration %}
{%- else %}
{{- message.content + eos_token }}
{%- endif %}
{{- '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
DATE_FORMAT = "%Y-%m-%d"


@dataclass(frozen=True)
class ChatTemplate:
    """A template with everything that decides what it renders.

    Attributes:
        source: Jinja text.
        special_tokens: what the tokenizer calls its own, such as ``{"eos_token": "</s>"}``.
        date: what `strftime_now` formats; None for the moment of rendering.
        control_tokens: texts that the tokenizer reads as one special token.
    """

    source: str
    special_tokens: Mapping[str, str]
    date: datetime | None = None
    control_tokens: frozenset[str] = frozenset()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        add_generation_prompt: bool = False,
        **variables: object,
    ) -> str:
        """Render messages.

        Raises: DataError: the template refuses them, with its line.
        """
        return self.render_marked(messages, tools, add_generation_prompt=add_generation_prompt, **variables)[0]

    def render_marked(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        add_generation_prompt: bool = False,
        **variables: object,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render messages; also return the spans of the text that `{% generation %}` marks enclose."""
        compiled, marks = self._compiled
        marks.begin()
        pieces: list[str] = []
        try:
            for piece in compiled.generate(
                **self.special_tokens,
                messages=[dict(_aliased(message)) for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            ):
                marks.place(piece)
                pieces.append(piece)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise DataError(
                f"the chat template refuses this row (template line {_template_line(error)}): {error}; "
                "change the row, or choose another template (data.chat_template=chatml, or a file)"
            ) from None
        return "".join(pieces), marks.spans

    @cached_property
    def _compiled(self) -> tuple[jinja2.Template, "_Marks"]:
        marks = _Marks()
        environment = _environment(lambda: self.date or datetime.now(), marks)
        try:
            return environment.from_string(self.source), marks
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"data.chat_template: not a Jinja template (line {error.lineno}): {error.message}; "
                "give chatml, a file, or Jinja text"
            ) from None

    @cached_property
    def words(self) -> frozenset[str]:
        """Names and texts that occur in the template's own expressions: what it can ask a message for or compare."""
        tree = _environment(datetime.now, _Marks()).parse(self.source)
        texts = {str(node.value) for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        names = {node.attr for node in tree.find_all(nodes.Getattr)} | {node.name for node in tree.find_all(nodes.Name)}
        return frozenset(texts | names)

    @cached_property
    def control(self) -> re.Pattern[str] | None:
        """Finds control tokens in a text, the longest where several begin."""
        return _pattern(self.control_tokens)

    @cached_property
    def signs(self) -> re.Pattern[str] | None:
        """Finds texts that mean something to the template's own expressions, such as </think>; no control tokens."""
        found = {word.strip() for word in self.words if re.search(r"[<\[].*[>\]]", word)}
        found = {sign for sign in found if self.control is None or not self.control.search(sign)}
        return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True)))) if found else None

    @cached_property
    def is_marked(self) -> bool:
        """Whether the author marked what the assistant says."""
        return "{% generation" in self.source or "{%- generation" in self.source

    @cached_property
    def knows_date(self) -> bool:
        return "strftime_now" in self.source


def choose_template(
    tokenizer: "PreTrainedTokenizerBase",
    given: str | None = None,
    *,
    date: str | None = None,
    stops: Collection[str] = (),
) -> ChatTemplate:
    """Choose the chat template: the one given ("chatml", a file, or Jinja text), else the tokenizer's own.

    Args:
        date: the day that a template prints, as 2026-01-31; None for the moment of rendering.
        stops: tokens at which generation stops, control tokens whatever the tokenizer says of them.
    Raises: ConfigError: the tokenizer has none, as base models do, and none was given; or what was given is neither.
    """
    if given is None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "the data are chats, but this tokenizer has no chat template (a base model); "
                "set data.chat_template=chatml, give a Jinja template, or start from the instruct model"
            )
        source = tokenizer.chat_template
        if isinstance(source, dict):  # several by name: the one for tools renders everything the other one does
            source = source.get("tool_use", source.get("default", next(iter(source.values()))))
    elif given == "chatml":
        source = CHATML
    elif "{" in given:
        source = given
    else:
        try:
            source = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"data.chat_template: {given!r} is neither chatml, nor Jinja text, nor a file ({error}); "
                "try data.chat_template=chatml"
            ) from None
    if source == CHATML and not tokenizer.eos_token:
        raise ConfigError(
            "data.chat_template=chatml ends turns with the tokenizer's end token, which it lacks; give a Jinja template"
        )
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    when = None if date is None else datetime.strptime(date, DATE_FORMAT)
    return ChatTemplate(source, special, when, control_tokens(tokenizer) | frozenset(stops))


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    """The texts that a tokenizer reads as one special token wherever they stand."""
    added = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added | set(tokenizer.all_special_tokens))


def control_pattern(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Finds control tokens in a text, the longest where several begin; None where there are none."""
    return _pattern(control_tokens(tokenizer))


def _pattern(texts: Collection[str]) -> re.Pattern[str] | None:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _aliased(message: Message) -> Message:
    """Offer reasoning under each of the names that templates read."""
    if "reasoning_content" not in message:
        return message
    thought = message["reasoning_content"]
    return {"reasoning": thought, "thinking": thought, **message}


class _Marks:
    """Where the `{% generation %}` blocks of one rendering lie. Jinja yields a block's text as a piece of its own."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self._length = 0
        self._open: list[str] = []

    def add(self, text: str) -> None:
        self._open.append(text)

    def place(self, piece: str) -> None:
        for text in self._open:
            if piece == text:
                self.spans.append((self._length, self._length + len(piece)))
        self._open.clear()
        self._length += len(piece)


def _environment(now: Callable[[], datetime], marks: _Marks) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    class Generation(jinja2.ext.Extension):
        """The tag around what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("enclose"), [], [], body).set_lineno(line)

        def enclose(self, caller: Callable[[], str]) -> str:
            text = caller()
            marks.add(text)
            return text

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _template_line(error: Exception) -> int | str:
    """Find the template's line: Jinja rewrites its frames so that they carry it."""
    line: int | str = "unknown"
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
