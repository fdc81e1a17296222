"""Which characters of a rendered chat are whose: what a row said, found again in the text, or missing from it.

A template is asked twice. Once with the chat as it is; once with every piece that the row said (a content, a reasoning,
the name and each argument of a call, each text of a tool schema) replaced by a *placeholder* that occurs nowhere else.
Placeholders that come out say where their piece belongs; one that does not come out names a piece that the template
drops. Put the pieces back and the first rendering must appear, character for character: then every character of the
text is known to be the row's or the template's. Searching for the words themselves would find "a" in "assistant".

Where a template computes with what it is given (upper case, lengths), that proof fails; then each piece is tried alone,
by putting a placeholder behind it, and nothing is known about places.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from longfit.data.messages import Chat
from longfit.data.template import ChatTemplate
from longfit.errors import DataError

TOOLS_TURN = -1  # the turn that tool schemas count as
ESSENTIAL = frozenset({"content", "reasoning", "tool call", "tools"})  # what training must not lose
PLUMBING = frozenset({"role", "type", "id", "tool_call_id"})  # structure: templates test it, some demand its form


@dataclass(frozen=True, slots=True)
class Piece:
    """Something a row says, in one place."""

    turn: int  # index of the message, or TOOLS_TURN
    kind: str  # one of ESSENTIAL, or the name of another key of the message
    said: str | int | float

    def spellings(self) -> list[str]:
        """How a template may write it: as it is, as JSON, as Python."""
        if not isinstance(self.said, str):
            return list(dict.fromkeys([json.dumps(self.said), str(self.said)]))
        escaped = [json.dumps(self.said, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
        return list(dict.fromkeys([self.said, *escaped, repr(self.said)[1:-1]]))


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of characters of the text that comes from one piece."""

    start: int
    end: int
    piece: Piece


@dataclass(frozen=True, slots=True)
class Rendering:
    """A chat as text.

    Attributes:
        text: what the template rendered.
        num_turns: how many of the chat's messages it shows.
        segments: where the pieces lie, in order; None if the template computes with what it is given.
        said: the pieces of the messages and the tool schemas.
        present: those of them that the text shows.
        marks: spans that the template's author marked as the assistant's.
    """

    text: str
    num_turns: int
    segments: tuple[Segment, ...] | None
    said: tuple[Piece, ...]
    present: frozenset[Piece]
    marks: tuple[tuple[int, int], ...]

    def of_turn(self, turn: int) -> list[Segment]:
        """The segments of one message."""
        return [segment for segment in self.segments or () if segment.piece.turn == turn]


def render(chat: Chat, template: ChatTemplate, *, num_turns: int | None = None) -> Rendering:
    """Render the first messages of a chat, and say where in the text each piece of them is.

    Raises: DataError: the template refuses the messages.
    """
    count = num_turns or len(chat.messages)
    text, marks = template.render_marked(chat.messages[:count], chat.tools)
    holders = _Placeholders(chat, template, count)
    try:
        with_holders = template.render(holders.messages, holders.tools)
    except DataError:  # it refuses placeholders although it takes the words: it looks into them
        with_holders = ""
    segments = _align(text, with_holders, holders)
    if segments is None:
        present = frozenset(piece for piece in holders.pieces.values() if _is_shown(piece, chat, template, count))
    else:
        present = frozenset(segment.piece for segment in segments)
    return Rendering(text, count, segments, tuple(holders.pieces.values()), present, tuple(marks))


class _Placeholders:
    """A chat whose pieces are replaced, and which placeholder stands for which piece."""

    def __init__(self, chat: Chat, template: ChatTemplate, num_turns: int) -> None:
        self.template = template
        self.pieces: dict[str, Piece] = {}
        self._by_piece: dict[Piece, str] = {}
        self._stem = _unused_stem(chat)
        self._numbers = 9_007_199_250_000_000  # 16 digits, exact in float64
        self._signs = template.signs  # these stay, and what is around them is replaced
        self.pattern = re.compile(f"{self._stem}[0-9]{{6}}Z|90071992[0-9]{{8}}")
        self.tools = [self._schema(tool) for tool in chat.tools]
        self.messages = [self._message(index, message) for index, message in enumerate(chat.messages[:num_turns])]

    def _holder(self, piece: Piece) -> str:
        known = self._by_piece.get(piece)
        if known is None:
            known = f"{self._stem}{len(self.pieces):06d}Z"
            self.pieces[known] = piece
            self._by_piece[piece] = known
        return known

    def _message(self, turn: int, message: dict[str, Any]) -> dict[str, Any]:
        replaced: dict[str, Any] = {}
        for key, value in message.items():
            if key == "content":
                replaced[key] = self._prose(turn, "content", value)
            elif key == "reasoning_content":
                replaced[key] = self._prose(turn, "reasoning", value)
            elif key == "tool_calls":
                replaced[key] = [self._call(turn, call) for call in value]
            elif key in PLUMBING:
                replaced[key] = value
            else:
                replaced[key] = self._value(turn, key, value)
        return replaced

    def _prose(self, turn: int, kind: str, text: str) -> str:
        """Replace a text but for its outer space and the template's own signs in it."""
        parts = self._signs.split(text) if self._signs else [text]
        signs = self._signs.findall(text) if self._signs else []
        if not any(part.strip() for part in parts):
            parts, signs = [text], []
        made = []
        for number, part in enumerate(parts):
            made.append(self._text(turn, kind, part))
            made += signs[number : number + 1]
        return "".join(made)

    def _text(self, turn: int, kind: str, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        return text[:start] + self._holder(Piece(turn, kind, core)) + text[start + len(core) :]

    def _call(self, turn: int, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = self._value(turn, "tool call", function["arguments"], keys=True)
        return {**call, "function": {"name": self._text(turn, "tool call", function["name"]), "arguments": arguments}}

    def _schema(self, tool: dict[str, Any]) -> dict[str, Any]:
        replaced: dict[str, Any] = self._value(TOOLS_TURN, "tools", tool)
        return replaced

    def _value(self, turn: int, kind: str, value: object, *, keys: bool = False) -> Any:
        """Replace the texts and numbers in a nested value; its keys too if they are the row's own words."""
        if isinstance(value, str):
            return value if value in self.template.words or not value else self._text(turn, kind, value)
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int | float):
            number = self._numbers
            self._numbers += 1
            self.pieces[str(number)] = Piece(turn, kind, value)
            return number
        if isinstance(value, dict):
            return {
                (
                    self._text(turn, kind, key)
                    if keys and key not in self.template.words and key.strip() == key
                    else key
                ): self._value(turn, kind, item, keys=keys or (kind == "tools" and key == "properties"))
                if not (kind == "tools" and key in PLUMBING)
                else item
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._value(turn, kind, item, keys=keys) for item in value]
        return value


def _unused_stem(chat: Chat) -> str:
    said = json.dumps(chat.said(), ensure_ascii=False, default=str)
    stem = "QZX"
    while stem in said:
        stem += "Q"
    return stem


def _align(text: str, with_holders: str, holders: _Placeholders) -> tuple[Segment, ...] | None:
    """Put the pieces back into the rendering of placeholders; None unless that gives the text, to the character."""
    segments: list[Segment] = []
    position, template_position = 0, 0
    for match in holders.pattern.finditer(with_holders):
        literal = with_holders[template_position : match.start()]
        piece = holders.pieces.get(match.group())
        if piece is None or not text.startswith(literal, position):
            return None
        position, template_position = position + len(literal), match.end()
        following = holders.pattern.search(with_holders, template_position)
        after = with_holders[template_position : following.start() if following else None]
        fits = [said for said in piece.spellings() if text.startswith(said, position)]
        fits = [said for said in fits if text.startswith(after, position + len(said))] or fits
        if not fits:
            return None
        segments.append(Segment(position, position + len(fits[0]), piece))
        position += len(fits[0])
    return tuple(segments) if text[position:] == with_holders[template_position:] else None


def _is_shown(piece: Piece, chat: Chat, template: ChatTemplate, num_turns: int) -> bool:
    """Whether the text changes when something is added to a piece, and shows what was added."""
    if not isinstance(piece.said, str):
        return True  # a number beside names that are checked
    sign = _unused_stem(chat)

    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(str(piece.said), f"{piece.said}{sign}") if value.strip() else value
        if isinstance(value, dict):
            return {changed(key): changed(item) for key, item in value.items()}
        return [changed(item) for item in value] if isinstance(value, list) else value

    if piece.turn == TOOLS_TURN:
        trial = replace(chat, tools=tuple(changed(tool) for tool in chat.tools))
    else:
        keys = {"content": "content", "reasoning": "reasoning_content", "tool call": "tool_calls"}
        key = keys.get(piece.kind, piece.kind)
        messages = list(chat.messages)
        messages[piece.turn] = {**messages[piece.turn], key: changed(messages[piece.turn][key])}
        trial = replace(chat, messages=tuple(messages))
    try:
        shown = template.render(trial.messages[:num_turns], trial.tools)
    except DataError:
        return True  # the template read it, or it could not refuse it
    return sign.lower() in shown.lower()


def missing(pieces: Sequence[Piece], renderings: Sequence[Rendering]) -> list[Piece]:
    """The pieces that none of the renderings shows."""
    shown = frozenset().union(*(rendering.present for rendering in renderings))
    return [piece for piece in pieces if piece not in shown]


def kinds_named(piece: Piece) -> str:
    """What a piece is one of, as errors call it."""
    return {"tool call": "tool calls", "tools": "tool schemas"}.get(piece.kind, piece.kind)
