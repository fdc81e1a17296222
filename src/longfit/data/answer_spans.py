"""Where an answer lies in a rendered chat: from the end of its prompt to the token that ends the turn.

A rendering serves an answer if it shows it as inference will: the text up to the answer is the prompt that the model
will be given, and the answer with its end is what follows when the chat stops there. Otherwise the answer needs a
rendering of its own, and `encoding.py` makes one.
"""

import re
from dataclasses import dataclass, field, replace

from longfit.data import provenance
from longfit.data.chat_notes import ChatNotes
from longfit.data.messages import Chat
from longfit.data.provenance import Rendering, kinds_named
from longfit.data.template import ChatTemplate
from longfit.data.turn_end import TurnEnd
from longfit.errors import DataError

EMPTY_BLOCK = re.compile(r"\s*<([^<>/\s]+)>\s*</\1>\s*")  # such as the think block of an answer without reasoning
NO_THINKING = ("enable_thinking", "thinking")  # variables by which templates are asked for an answer without reasoning


@dataclass(slots=True)
class Row:
    """One rendering with the spans of it that are trained, in characters."""

    rendering: Rendering
    spans: list[tuple[int, int]] = field(default_factory=list)


def make_rendering(chat: Chat, num_turns: int, template: ChatTemplate, turn_end: TurnEnd | None) -> Rendering:
    """Render; an answer at the end that only another turn's first token would end gets that token."""
    rendering = provenance.render(chat, template, num_turns=num_turns)
    if turn_end is None or turn_end.is_written or chat.messages[num_turns - 1]["role"] != "assistant":
        return rendering
    return replace(rendering, text=rendering.text + turn_end.token)


def place(
    chat: Chat,
    turn: int,
    rows: list[Row],
    template: ChatTemplate,
    turn_end: TurnEnd | None,
    notes: ChatNotes,
) -> tuple[Row, tuple[int, int]]:
    """Find a rendering that shows an answer as inference will, or add one; return it and the answer's span in it.

    Raises: DataError: the answer has no place or no end in its own rendering.
    """
    before = template.render(chat.messages[:turn], chat.tools, add_generation_prompt=True)
    upto = template.render(chat.messages[: turn + 1], chat.tools)
    for row in rows:
        if span := _span(row.rendering, turn, before, upto, template, turn_end):
            return row, _without_boilerplate(row.rendering, span, before, chat, turn, template, notes)
    own = Row(make_rendering(chat, turn + 1, template, turn_end))
    span = _span(own.rendering, turn, before, upto, template, turn_end)
    if span is None:
        raise _no_span(own.rendering, turn, before)
    rows.append(own)
    return own, _without_boilerplate(own.rendering, span, before, chat, turn, template, notes)


def _span(
    rendering: Rendering, turn: int, before: str, upto: str, template: ChatTemplate, turn_end: TurnEnd | None
) -> tuple[int, int] | None:
    """Find an answer in a rendering: (first character, one past its end token); None if it is not as inference shows.

    Args:
        before: the prompt of the answer.
        upto: the chat up to and with the answer.
    """
    text, own = rendering.text, rendering.of_turn(turn)
    start = _shared(before, text)
    if rendering.segments is None:
        if not text.startswith(before) or template.control is None:
            return None
        said_end, following = start, len(text)
    else:
        if not own:
            return None
        start = start if text.startswith(before) else min(start, own[0].start)  # not into what only looks alike
        if any(start < segment.end <= own[0].start for segment in rendering.segments if segment.piece.turn != turn):
            return None
        said_end = own[-1].end
        following = min((s.start for s in rendering.segments if s.start >= said_end), default=len(text))
    shared = _shared(upto, text)
    for end, is_written in _ends(text, said_end, following, template, turn_end):
        if shared >= (end if is_written else said_end):
            return start, end
    return None


def _shared(one: str, other: str) -> int:
    """How many first characters two texts have in common, found by halving: slices compare at memory speed."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _ends(text: str, start: int, stop: int, template: ChatTemplate, turn_end: TurnEnd | None) -> list[tuple[int, bool]]:
    """Where the answer may end between its last word and the next turn's first: (position, whether it is written)."""
    if template.control is None or turn_end is None:
        return []
    found = list(template.control.finditer(text, start, stop))
    exact = [(match.end(), turn_end.is_written) for match in found if match.group() == turn_end.token]
    if exact or turn_end.is_written:
        return exact[:1]
    return [(match.end(), False) for match in found[:1]]  # another role's token ends it as well


def _no_span(rendering: Rendering, turn: int, before: str) -> DataError:
    if rendering.segments is not None and not rendering.of_turn(turn):
        kinds = " and ".join(sorted({kinds_named(piece) for piece in rendering.said if piece.turn == turn}))
        return DataError(
            f"0 trained tokens: the chat template drops the {kinds or 'answer'} of turn {turn + 1}, and nothing of "
            "that answer is left; choose a template that shows it (data.chat_template=chatml, or a file)"
        )
    known = _shared(before, rendering.text)
    if rendering.segments is not None and any(
        known < segment.end <= rendering.of_turn(turn)[0].start for segment in rendering.segments
    ):
        return DataError(
            f"the chat template writes another history when it asks for the answer in turn {turn + 1} than when it "
            "shows it, so the answer's tokens cannot be told apart; choose another with data.chat_template"
        )
    return DataError(
        f"the chat template writes no end token behind the answer in turn {turn + 1}, so the model would never learn "
        "to stop; choose another with data.chat_template (chatml, or a file)"
    )


def _without_boilerplate(
    rendering: Rendering,
    span: tuple[int, int],
    before: str,
    chat: Chat,
    turn: int,
    template: ChatTemplate,
    notes: ChatNotes,
) -> tuple[int, int]:
    """Move the start of a span behind what the template itself puts before the answer, such as an empty think block."""
    start, end = span
    own = rendering.of_turn(turn)
    first = own[0].start if own else start
    for variable in NO_THINKING:
        if variable in template.words:
            prompt = template.render(chat.messages[:turn], chat.tools, add_generation_prompt=True, **{variable: False})
            if rendering.text.startswith(prompt) and start < len(prompt) <= first:
                start = len(prompt)
    if empty := EMPTY_BLOCK.match(rendering.text, start, first):
        start = empty.end()
    if not rendering.text.startswith(before):
        notes.counts[f"answers do not begin with {before[start:]!r}, which the template's prompt ends with"] += 1
    if start != span[0]:
        notes.counts["answers follow an empty block that the template adds; it is masked"] += 1
    return start, end


def marked_spans(
    rendering: Rendering, turn: int, span: tuple[int, int], template: ChatTemplate
) -> list[tuple[int, int]]:
    """Cut a span to what the template's author marked as the assistant's; the end token is trained in any case.

    Raises: DataError: nothing of the answer is marked.
    """
    start, end = span
    if not template.is_marked:
        return [span]
    marked = [(max(start, a), min(end, b)) for a, b in rendering.marks if a < end and b > start]
    if not any(a < b for a, b in marked):
        raise DataError(
            f"the template's {{% generation %}} marks do not cover the answer in turn {turn + 1}; fix the template, "
            "or choose another with data.chat_template"
        )
    last = max(b for _, b in marked)
    behind = list(template.control.finditer(rendering.text, last, end)) if template.control else []
    return [*marked, (behind[-1].start(), end)] if behind else marked
