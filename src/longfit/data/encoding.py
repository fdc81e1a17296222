"""A chat becomes tokens, and of these exactly the answers and the tokens that end them are trained.

An answer's span begins where the prompt ends that the model will be given to answer (the turns before it, rendered with
the generation prompt), and ends with the token that ends a turn. Both are found by rendering. What must hold, or the
answer is rendered on its own (the chat up to it, one more row of tokens): rendering the chat up to the answer gives the
beginning of the text that trains it. Templates that rewrite earlier turns, as those of reasoning models do, so train
every answer as inference will show it.

Every piece that the row says must be in one of its renderings (`provenance.py`); a template that drops a call, a
schema, a reasoning or a content is refused by name unless the caller allows it, and then it is counted. Control tokens
inside what a row says are tokenised as text.

    encode_chat         a chat -> rows of tokens with their trained mask
    encode_prompt       messages -> the tokens that the model is given to answer
    find_turn_end       a template -> the token that ends a turn in it
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from longfit.data import provenance
from longfit.data.messages import Chat, Message
from longfit.data.provenance import ESSENTIAL, TOOLS_TURN, Piece, Rendering
from longfit.data.template import ChatTemplate
from longfit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN_ON = ("all", "last", "marked")
TEMPLATE_DROPS = ("error", "allow")
EMPTY_BLOCK = re.compile(r"\s*<([^<>/\s]+)>\s*</\1>\s*")  # such as the think block of an answer without reasoning
NO_THINKING = ("enable_thinking", "thinking")  # variables by which templates are asked for an answer without reasoning


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The token that ends an answer; `is_written` unless only the next turn's first token shows the end (GLM-4)."""

    token: str
    is_written: bool


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A rendering of a chat as tokens, and which of them the model is trained to say."""

    input_ids: np.ndarray  # int32 [N]
    trained: np.ndarray  # bool [N]


@dataclass(slots=True)
class ChatNotes:
    """What a user should know about how chats were read: counts of chats or turns, by the line that tells them."""

    counts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # keys of messages that the template does not read
    ends: set[str] = field(default_factory=set)  # tokens that end answers

    def update(self, other: "ChatNotes") -> None:
        self.counts.update(other.counts)
        self.unread.update(other.unread)
        self.ends |= other.ends


@dataclass(slots=True)
class _Row:
    """One rendering with the spans of it that are trained, in characters."""

    rendering: Rendering
    spans: list[tuple[int, int]] = field(default_factory=list)


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
    chat = _as_template_knows(chat, template, notes)
    turns = _trained_turns(chat, train_on, notes)
    rows = [_Row(_rendering(chat, len(chat.messages), template, turn_end))]
    for turn in reversed(turns):
        row, span = _place(chat, turn, rows, template, turn_end, notes)
        row.spans += _marked_spans(row.rendering, turn, span, template)
    _check_complete(chat, turns, rows, template, template_drops, notes)
    kept = [row for row in reversed(rows) if row.spans]
    if provenance.missing(rows[0].rendering.said, [row.rendering for row in kept]) and rows[0] not in kept:
        notes.counts["chats go on after their last trained answer; what follows it is left out"] += 1
    if len(kept) > 1:
        notes.counts["chats are trained in a row of tokens per rewritten answer: the template rewrites turns"] += 1
    return [_tokenise(row, tokenizer, template, notes) for row in kept]


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
    ids, _ = _text_to_tokens(text, inside, tokenizer, template)
    return _with_bos(ids, tokenizer)


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


def _rendering(chat: Chat, num_turns: int, template: ChatTemplate, turn_end: TurnEnd | None) -> Rendering:
    """Render; an answer at the end that only another turn's first token would end gets that token."""
    rendering = provenance.render(chat, template, num_turns=num_turns)
    if turn_end is None or turn_end.is_written or chat.messages[num_turns - 1]["role"] != "assistant":
        return rendering
    return replace(rendering, text=rendering.text + turn_end.token)


def _place(
    chat: Chat,
    turn: int,
    rows: list[_Row],
    template: ChatTemplate,
    turn_end: TurnEnd | None,
    notes: ChatNotes,
) -> tuple[_Row, tuple[int, int]]:
    """Find a rendering that shows an answer as inference will, or add one; return it and the answer's span in it.

    Raises: DataError: the answer has no place or no end in its own rendering.
    """
    before = template.render(chat.messages[:turn], chat.tools, add_generation_prompt=True)
    upto = template.render(chat.messages[: turn + 1], chat.tools)
    for row in rows:
        if span := _span(row.rendering, turn, before, upto, template, turn_end):
            return row, _without_boilerplate(row.rendering, span, before, chat, turn, template, notes)
    own = _Row(_rendering(chat, turn + 1, template, turn_end))
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
        kinds = " and ".join(sorted({_kind(piece) for piece in rendering.said if piece.turn == turn}))
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


def _marked_spans(
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


def _check_complete(
    chat: Chat,
    turns: Sequence[int],
    rows: Sequence[_Row],
    template: ChatTemplate,
    template_drops: str,
    notes: ChatNotes,
) -> None:
    """Find everything that the row says in its renderings.

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
        dropped[_where(piece)] = None
    if dropped and template_drops == "error":
        raise DataError(
            f"the chat template drops {', '.join(dropped)}; choose a template that shows it "
            "(data.chat_template=chatml, or a file), or train without it: data.template_drops=allow"
        )
    for kind in {_kind(piece) for piece in lost if piece.kind in ESSENTIAL and _where(piece) in dropped}:
        notes.counts[f"chats lose {kind}: the template drops it, and data.template_drops allows that"] += 1
    shown = {piece.kind for row in rows for piece in row.rendering.present}
    core = {"role", "content", "reasoning_content", "tool_calls"}
    for message in chat.messages:
        for key, value in message.items():
            if key not in core and key not in shown and key not in template.words and value not in ("", [], {}):
                notes.unread[key] += 1


def _kind(piece: Piece) -> str:
    return {"tool call": "tool calls", "tools": "tool schemas"}.get(piece.kind, piece.kind)


def _where(piece: Piece) -> str:
    if piece.turn == TOOLS_TURN:
        return "the tool schemas"
    return f"the {piece.kind} of turn {piece.turn + 1}"


def _tokenise(row: _Row, tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate, notes: ChatNotes) -> EncodedChat:
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
    ids, starts = _text_to_tokens(rendering.text, said, tokenizer, template, notes)
    trained = np.zeros(len(ids), dtype=bool)
    for start, end in row.spans:
        trained |= (starts >= start) & (starts < end)
    whole = _with_bos(ids, tokenizer)
    trained = np.concatenate([np.zeros(len(whole) - len(ids), dtype=bool), trained])
    if not trained[1:].any():
        raise DataError("0 trained tokens: the template renders nothing of the assistant's answer")
    for _, end in row.spans:
        found = [token for token in template.control_tokens if rendering.text.endswith(token, 0, end)]
        notes.ends.update(found[:1] if len(found) == 1 else [max(found, key=len)] if found else [])
    return EncodedChat(whole, trained)


def _with_bos(ids: np.ndarray, tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    """Begin with BOS exactly once if the tokenizer begins its texts with it.

    Raises: DataError: the template wrote two.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    if len(ids) > 1 and ids[0] == ids[1] == bos:
        raise DataError(
            f"two {tokenizer.bos_token!r} tokens at the start; remove one from the template (data.chat_template)"
        )
    begins = tokenizer("a")["input_ids"]
    if len(begins) > 1 and begins[0] == bos and not (len(ids) and ids[0] == bos):
        return np.concatenate([np.asarray([bos], dtype=np.int32), ids])
    return ids


def _text_to_tokens(
    text: str,
    said: Sequence[tuple[int, int]],
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate,
    notes: ChatNotes | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise a rendering in which control tokens are control only outside of what a row says.

    Args:
        said: spans of the text that come from the row.
    Returns: ids int32 ``[N]``; the character at which each token begins, int64 ``[N]``.
    Raises: DataError: the tokenizer cannot read these control tokens as text.
    """
    matches = list(template.control.finditer(text)) if template.control else []
    typed = [m for m in matches if any(start < m.end() and m.start() < end for start, end in said)]
    if not typed:
        return _tokens(text, tokenizer)
    if notes is not None:
        notes.counts["rows spell out control tokens in what they say; they are tokenised as text"] += 1
    control = [match for match in matches if match not in typed]
    pieces = _by_sections(text, control, tokenizer)
    # Sections are tokenised one by one, which some tokenizers do otherwise than in the whole; words of the same length
    # in the place of the typed control tokens show whether this one does.
    harmless = text
    for match in typed:
        harmless = harmless[: match.start()] + "x" * len(match.group()) + harmless[match.end() :]
    whole, _ = _tokens(harmless, tokenizer)
    if not np.array_equal(_by_sections(harmless, control, tokenizer)[0], whole):
        raise DataError(
            f"it spells out the control token {typed[0].group()!r}, which this tokenizer cannot read as text; "
            "remove it, or skip such rows with data.bad_rows=skip"
        )
    return pieces


def _by_sections(
    text: str, control: Sequence["re.Match[str]"], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise what lies between control tokens as text, whatever it spells."""
    all_ids, all_starts = [], []
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    position = 0
    for match in [*control, None]:
        end = match.start() if match else len(text)
        token = added.get(match.group()) if match else None
        if token is not None and token.lstrip:  # it swallows the space around it
            end = len(text[:end].rstrip())
        if end > position:
            ids, starts = _tokens(text[position:end], tokenizer, as_text=True)
            all_ids.append(ids)
            all_starts.append(starts + position)
        if match:
            all_ids.append(np.asarray([tokenizer.convert_tokens_to_ids(match.group())], dtype=np.int32))
            all_starts.append(np.asarray([match.start()], dtype=np.int64))
            position = match.end()
            if token is not None and token.rstrip:
                position = len(text) - len(text[position:].lstrip())
    return np.concatenate(all_ids), np.concatenate(all_starts)


def _tokens(text: str, tokenizer: "PreTrainedTokenizerBase", *, as_text: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise; ids and the character at which each token begins. `as_text`: control tokens in it are text."""
    options = {"split_special_tokens": True} if as_text else {}
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options)
        starts = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
        return np.asarray(encoded["input_ids"], dtype=np.int32), starts
    ids = np.asarray(tokenizer(text, add_special_tokens=False, **options)["input_ids"], dtype=np.int32)
    return ids, _starts_without_offsets(text, ids, tokenizer)


def _starts_without_offsets(text: str, ids: np.ndarray, tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    """Find where tokens begin, for tokenizers written in Python: decode prefixes and see how long they are.

    Raises: DataError: the decoded prefixes are no prefixes of the text.
    """
    starts = np.zeros(len(ids), dtype=np.int64)
    length = 0
    for index in range(len(ids)):
        starts[index] = length
        head = tokenizer.decode(ids[: index + 1].tolist(), clean_up_tokenization_spaces=False)
        whole = head.rstrip("\N{REPLACEMENT CHARACTER}")
        if not text.startswith(whole):
            raise DataError(
                "this slow tokenizer does not give its text back, so the answer's tokens cannot be told apart; "
                "use a fast tokenizer (tokenizer.json)"
            )
        length = len(whole)
    return starts
