"""Which token ends an answer in a template: found by rendering an answer at the end, and before another turn.

What this is not: it finds no answer in a text (`answer_spans.py`).
"""

from collections.abc import Collection
from dataclasses import dataclass

from longfit.data import provenance
from longfit.data.messages import Chat
from longfit.data.template import ChatTemplate
from longfit.errors import DataError


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The token that ends an answer; `is_written` unless only the next turn's first token shows the end (GLM-4)."""

    token: str
    is_written: bool


def find_turn_end(template: ChatTemplate, *, stops: Collection[str] = ()) -> TurnEnd | None:
    """Tell which token ends an answer, from what the template writes behind one at the end and before another turn.

    Args:
        stops: tokens at which generation stops, by the model's own settings; they decide between several.
    Returns: None if it writes none, or refuses so small a chat.
    """
    asked, said = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    try:
        alone = provenance.render(Chat((asked, said)), template)
        followed = provenance.render(Chat((asked, said, {"role": "user", "content": "more"})), template)
    except DataError:
        return _first_stop(template, stops)
    if template.control is not None and (alone.segments is None or followed.segments is None):
        return _first_stop(template, stops)
    if template.control is None or not alone.of_turn(1) or not followed.of_turn(1) or not followed.of_turn(2):
        return None
    at_end = template.control.findall(alone.text, alone.of_turn(1)[-1].end)
    between = template.control.findall(followed.text, followed.of_turn(1)[-1].end, followed.of_turn(2)[0].start)
    common = [token for token in at_end if token in between]
    for token in [*(token for token in common if token in stops), *common, *at_end]:
        return TurnEnd(token, is_written=True)
    bos = template.special_tokens.get("bos_token")
    for token in [*(token for token in between if token in stops), *(token for token in between if token != bos)]:
        return TurnEnd(token, is_written=False)
    return None


def _first_stop(template: ChatTemplate, stops: Collection[str]) -> TurnEnd | None:
    """For templates that refuse the smallest chat or compute with it: the tokenizer's end token, or another stop."""
    token = template.special_tokens.get("eos_token") or min(stops, default=None)
    return TurnEnd(token, is_written=True) if token else None
