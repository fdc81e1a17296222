"""A chat becomes tokens, and of these exactly the answers and the tokens that end them are trained.

An answer's span begins where the prompt ends that the model will be given to answer (the turns before it, rendered with
the generation prompt), and ends with the token that ends a turn. Both are found by rendering. What must hold, or the
answer is rendered on its own (the chat up to it, one more row of tokens): rendering the chat up to the answer gives the
beginning of the text that trains it. Templates that rewrite earlier turns, as those of reasoning models do, so train
every answer as inference will show it.

Every piece that the row says must be in one of its renderings (`provenance.py`); a template that drops a call, a
schema, a reasoning or a content is refused by name unless the caller allows it, and then it is counted.

    encode_chat         a chat -> rows of tokens with their trained mask
    encode_prompt       messages -> the tokens that the model is given to answer
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from longfit.data import provenance
from longfit.data.answer_spans import Row, make_rendering, marked_spans, place
from longfit.data.chat_notes import ChatNotes
from longfit.data.chat_tokens import text_to_tokens, with_bos
from longfit.data.messages import Chat, Message
from longfit.data.provenance import ESSENTIAL, TOOLS_TURN, Piece, kinds_named
from longfit.data.template import ChatTemplate
from longfit.data.turn_end import TurnEnd
from longfit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN_ON = ("all", "last", "marked")
TEMPLATE_DROPS = ("error", "allow")
REWRITTEN = (
    "chats are trained in a row of tokens for each answer that the template shows otherwise later; the rows do not see "
    "each other (data.train_on=last trains the last answer alone)"
)


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A rendering of a chat as tokens, and which of them the model is trained to say."""

    input_ids: np.ndarray  # int32 [N]
    trained: np.ndarray  # bool [N]


def encode_chat(
    chat: Chat,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    template: ChatTemplate,
    turn_end: TurnEnd | None,
    train_on: str = "all",
    template_drops: str = "error",
    notes: ChatNotes | None = None,
) -> list[EncodedChat]:
    """Render a chat, tokenise it, and mark the answers (end tokens included) as trained.

    Args:
        template: from `choose_template`.
        turn_end: from `find_turn_end`.
        train_on: "all" answers except those that say they are not, only the "last", or those "marked" as trained.
        template_drops: "error" refuses a chat of which the template does not show everything; "allow" counts it.
        notes: counts are added to it.
    Returns: one row of tokens, or several where the template rewrites earlier turns.
    Raises: DataError: the template refuses the messages (with its line), drops something, or ends no answer; nothing
        to train; two BOS tokens.
    """
    notes = notes if notes is not None else ChatNotes()
    rows, _ = render_answers(
        chat, template, turn_end=turn_end, train_on=train_on, template_drops=template_drops, notes=notes
    )
    return [_tokenise(row, tokenizer, template, notes) for row in rows]


def render_answers(
    chat: Chat,
    template: ChatTemplate,
    *,
    turn_end: TurnEnd | None,
    train_on: str,
    template_drops: str,
    notes: ChatNotes,
) -> tuple[list[Row], list[Piece]]:
    """Render a chat as often as its answers need, and mark them.

    Args: as of `encode_chat`.
    Returns: the renderings that train something, in order; what the row says and none of all renderings shows.
    Raises: DataError: as `encode_chat`.
    """
    chat = _as_template_knows(chat, template, notes)
    turns = _trained_turns(chat, train_on, notes)
    rows = [Row(make_rendering(chat, len(chat.messages), template, turn_end))]
    for turn in reversed(turns):
        row, span = place(chat, turn, rows, template, turn_end, notes)
        row.spans += marked_spans(row.rendering, turn, span, template)
    lost = _check_complete(chat, turns, rows, template, template_drops, notes)
    kept = [row for row in reversed(rows) if row.spans]
    if provenance.missing(rows[0].rendering.said, [row.rendering for row in kept]) and rows[0] not in kept:
        notes.counts["chats go on after their last trained answer; what follows it is left out"] += 1
    if len(kept) > 1:
        notes.counts[REWRITTEN] += 1
    return kept, lost


def encode_prompt(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", *, template: ChatTemplate
) -> np.ndarray:
    """Tokenise what the model is given to answer, as it was trained: int32 ``[N]``.

    Raises: DataError: the template refuses the messages.
    """
    chat = _as_template_knows(Chat(tuple(messages)), template, ChatNotes())
    text = template.render(chat.messages, add_generation_prompt=True)
    without = provenance.render(chat, template)
    inside = [(s.start, s.end) for s in without.segments or () if text[: s.end] == without.text[: s.end]]
    ids, _ = text_to_tokens(text, inside, tokenizer, template)
    return with_bos(ids, tokenizer, template)


def _as_template_knows(chat: Chat, template: ChatTemplate, notes: ChatNotes) -> Chat:
    """Say developer turns as system turns, and reasoning inside the content, to templates that know only these."""
    messages = list(chat.messages)
    for index, message in enumerate(messages):
        if message["role"] == "developer" and "developer" not in template.words:
            messages[index] = message = {**message, "role": "system"}
            notes.counts["developer turns are rendered as system turns: the template knows no developer"] += 1
        thought = message.get("reasoning_content")
        knows = template.words & {"reasoning_content", "reasoning", "thinking"}
        if thought and not knows and any("</think>" in word for word in template.words):
            rest = {key: value for key, value in message.items() if key != "reasoning_content"}
            messages[index] = {**rest, "content": f"<think>\n{thought}\n</think>\n\n{message['content']}"}
    return replace(chat, messages=tuple(messages))


def _trained_turns(chat: Chat, train_on: str, notes: ChatNotes) -> list[int]:
    """Choose the answers to train.

    Raises: DataError: none is left. ConfigError: no such choice.
    """
    if train_on not in TRAIN_ON:
        raise ConfigError(f"data.train_on {train_on!r}: allowed are {', '.join(TRAIN_ON)}")
    answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    prompted = [index for index in answers if any(chat.messages[i]["role"] != "assistant" for i in range(index))]
    if not prompted:
        raise DataError(
            "the chat begins with the assistant, so there is no prompt its first answer could follow; "
            "remove that turn or put a user turn before it"
        )
    if len(prompted) < len(answers):
        notes.counts["chats begin with the assistant: turns before the first other turn are context, not trained"] += 1
    context = [index for index, flag in enumerate(chat.flags) if flag and index not in answers]
    if context:
        notes.counts["turns that are no answers are marked as trained; only answers are trained"] += len(context)
    if train_on == "marked":
        turns = [index for index in prompted if chat.flags[index]]
        if not turns:
            raise DataError(
                "0 trained tokens: no answer is marked as trained (weight: 1, train: true); set data.train_on=all"
            )
        return turns
    turns = [index for index in prompted[-1 if train_on == "last" else 0 :] if chat.flags[index] is not False]
    if not turns:
        raise DataError("0 trained tokens: every answer is marked as not trained; remove the row")
    if masked := len([index for index in prompted if chat.flags[index] is False]):
        notes.counts["answers are masked as their rows say (weight, train or loss)"] += masked
    return turns


def _check_complete(
    chat: Chat,
    turns: Sequence[int],
    rows: Sequence[Row],
    template: ChatTemplate,
    template_drops: str,
    notes: ChatNotes,
) -> list[Piece]:
    """Find everything that the row says in its renderings; return what is in none.

    Raises: DataError: something that matters is in none of them, and that is not allowed.
    """
    if template_drops not in TEMPLATE_DROPS:
        raise ConfigError(f"data.template_drops {template_drops!r}: allowed are {', '.join(TEMPLATE_DROPS)}")
    lost = provenance.missing(rows[0].rendering.said, [row.rendering for row in rows])
    dropped: dict[str, None] = {}
    for piece in lost:
        if piece.kind not in ESSENTIAL:
            continue
        if piece.kind == "reasoning" and piece.turn not in turns:
            notes.counts["reasonings of answers that are not trained are left out, as the template does"] += 1
            continue
        dropped[where(piece)] = None
    if dropped and template_drops == "error":
        raise DataError(
            f"the chat template drops {', '.join(dropped)}; choose a template that shows it "
            "(data.chat_template=chatml, or a file), or train without it: data.template_drops=allow"
        )
    for kind in {kinds_named(piece) for piece in lost if piece.kind in ESSENTIAL and where(piece) in dropped}:
        notes.counts[f"chats lose {kind}: the template drops it, and data.template_drops allows that"] += 1
    said = {(piece.turn, piece.kind) for piece in rows[0].rendering.said}
    shown = {(piece.turn, piece.kind) for row in rows for piece in row.rendering.present}
    core = {"role", "content", "reasoning_content", "tool_calls"}
    for turn, message in enumerate(chat.messages):
        for key, value in message.items():
            if key in core or value in ("", [], {}):
                continue
            # What is no text leaves no trace in a rendering; then it counts whether the template knows the key.
            if (turn, key) not in shown if (turn, key) in said else key not in template.words:
                notes.unread[key] += 1
    return lost


def where(piece: Piece) -> str:
    """What a piece is, in words."""
    if piece.turn == TOOLS_TURN:
        return "the tool schemas"
    return f"the {piece.kind} of turn {piece.turn + 1}"


def _tokenise(row: Row, tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate, notes: ChatNotes) -> EncodedChat:
    """Tokenise once; a token is trained if it begins inside a span. One that straddles its start is not answer."""
    rendering = row.rendering
    said = [(segment.start, segment.end) for segment in rendering.segments or ()]
    if rendering.segments is None and template.control is not None:
        typed = [p.said for p in rendering.present if isinstance(p.said, str) and template.control.search(p.said)]
        if typed:
            raise DataError(
                f"it spells out a control token in {typed[0]!r:.60}, and the chat template changes what it is given, "
                "so the two cannot be told apart; remove it, or skip such rows with data.bad_rows=skip"
            )
    ids, starts = text_to_tokens(rendering.text, said, tokenizer, template, notes)
    trained = np.zeros(len(ids), dtype=bool)
    for start, end in row.spans:
        trained |= (starts >= start) & (starts < end)
    whole = with_bos(ids, tokenizer, template)
    trained = np.concatenate([np.zeros(len(whole) - len(ids), dtype=bool), trained])
    if not trained[1:].any():
        raise DataError("0 trained tokens: the template renders nothing of the assistant's answer")
    for _, end in row.spans:
        found = [token for token in template.control_tokens if rendering.text.endswith(token, 0, end)]
        notes.ends.update(found[:1] if len(found) == 1 else [max(found, key=len)] if found else [])
    return EncodedChat(whole, trained)
