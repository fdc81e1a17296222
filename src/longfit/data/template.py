"""A chat template: Jinja text that turns messages into the text a model reads, with the day it may print held fixed.

It is rendered in a process of its own (`rendering.py`), because a template is a program of somebody else. A run needs
what transformers does not offer: a date that a resumed run sees again, the words the template itself knows, and where
its generation marks lie in the text.

What this is not: it does not know which tokens are trained (`encoding.py`).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes

from longfit.data.messages import Message, Tool
from longfit.data.rendering import MEMORY_BYTES, Marks, environment
from longfit.data.template_process import LIMIT_S, template_process
from longfit.errors import ConfigError, DataError
from longfit.files.reading import read_text
from longfit.words import format_bytes

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
LARGEST_TEMPLATE_BYTES = 1 << 20  # the largest known has a twentieth


@dataclass(frozen=True)
class ChatTemplate:
    """A template with everything that decides what it renders.

    Attributes:
        source: Jinja text.
        special_tokens: what the tokenizer calls its own, such as ``{"eos_token": "</s>"}``.
        date: what `strftime_now` formats; None for the moment of rendering.
        control_tokens: texts that the tokenizer reads as one special token.
        name: what errors call it.
        adds_bos: whether the tokenizer begins its texts with BOS.
    """

    source: str
    special_tokens: Mapping[str, str]
    date: datetime | None = None
    control_tokens: frozenset[str] = frozenset()
    name: str = "the chat template"
    adds_bos: bool = False

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        add_generation_prompt: bool = False,
        **variables: object,
    ) -> str:
        """Render messages.

        Raises: DataError: the template refuses them, with its line. ConfigError: it is no template, or takes too long
            or too much memory.
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
        given = {
            **self.special_tokens,
            "messages": [dict(_aliased(message)) for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        found = template_process().render(self.source, date=self.date, variables=given)
        if "refused" in found:
            raise DataError(
                f"{self.name} refuses this row (template line {found['line']}): {found['refused']}; "
                "change the row, or choose another template (data.chat_template=chatml, or a file)"
            )
        if "text" not in found:
            raise ConfigError(f"{self.name}: {_trouble(found)}; give chatml, a file, or Jinja text")
        return found["text"], [(start, end) for start, end in found["spans"]]

    @cached_property
    def words(self) -> frozenset[str]:
        """Names and texts that occur in the template's own expressions: what it can ask a message for or compare."""
        try:
            tree = environment(datetime.now, Marks()).parse(self.source)
        except jinja2.TemplateSyntaxError as error:
            trouble = _trouble({"syntax": error.message, "line": error.lineno})
            raise ConfigError(f"{self.name}: {trouble}; give chatml, a file, or Jinja text") from None
        except RecursionError:
            raise ConfigError(f"{self.name}: is nested too deeply; give chatml, a file, or Jinja text") from None
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
    name = "the chat template"
    if given is None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "the data are chats, but this tokenizer has no chat template (a base model); "
                "set data.chat_template=chatml, give a Jinja template, or start from the instruct model"
            )
        source = tokenizer.chat_template
        if isinstance(source, dict):  # several by name: the one for tools renders everything the other one does
            source = source.get("tool_use", source.get("default", next(iter(source.values()), None)))
        if not isinstance(source, str):
            raise ConfigError(
                f"the tokenizer's chat template is {type(source).__name__}, not a text; fetch its files again, "
                "or give chatml, a file, or Jinja text in data.chat_template"
            )
    elif given == "chatml":
        source = CHATML
    elif "{" in given:
        source = given
    else:
        source, name = read_template(given), f"the chat template {given}"
    if source == CHATML and not tokenizer.eos_token:
        raise ConfigError(
            "data.chat_template=chatml ends turns with the tokenizer's end token, which it lacks; give a Jinja template"
        )
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    when = None if date is None else datetime.strptime(date, DATE_FORMAT)
    begins = tokenizer("a")["input_ids"]
    adds_bos = len(begins) > 1 and begins[0] == tokenizer.bos_token_id
    return ChatTemplate(source, special, when, control_tokens(tokenizer) | frozenset(stops), name, adds_bos)


def read_template(path: str) -> str:
    """Read a template from a file.

    Raises: ConfigError: it is none, and no other way of giving a template.
    """
    if not Path(path).exists():
        raise ConfigError(
            f"data.chat_template: {path!r} is neither chatml, nor Jinja text, nor a file; try data.chat_template=chatml"
        )
    return read_text(
        Path(path), ConfigError, what="the chat template", do="try data.chat_template=chatml",
        largest_bytes=LARGEST_TEMPLATE_BYTES,
    )  # fmt: skip


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


def _trouble(found: Mapping[str, Any]) -> str:
    """Say why a template gave no text; ``found`` is the answer of the process that it ran in."""
    if "syntax" in found:
        return f"not a Jinja template (line {found['line']}): {found['syntax']}"
    if "slow" in found:
        return f"a chat was not rendered in {LIMIT_S:.0f} s; it probably loops for ever"
    if "grows" in found:
        return f"made a text of more than {found['grows']:,} characters of one chat; it probably loops"
    return f"took more than {format_bytes(MEMORY_BYTES)} of memory to render one chat"
