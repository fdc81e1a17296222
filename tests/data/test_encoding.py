"""Through the templates of all families: exactly what the assistant says is trained, and nothing a row says is lost."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.chat_templates import SHAPES, Shape
from tests.data.chats import CHATS, TOOLS, says, tokenize, trained_text, user
from transformers import PreTrainedTokenizerFast

from longfit.data import encoding
from longfit.data.messages import read_chat
from longfit.data.template import ChatTemplate, choose_template
from longfit.errors import DataError

TABLE = Path(__file__).parent.parent.parent / "docs" / "explanation" / "chat-templates.md"


@pytest.mark.parametrize("family", SHAPES)
def test_answers_and_the_token_that_ends_them_are_trained(
    family: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    shape, tokenizer = SHAPES[family], tokenizers[family]
    for kind, answers in (("single", ["Hello."]), ("multi-turn", ["b", "d"])):
        found = tokenize(CHATS[kind][0], shape, tokenizer)
        assert [text.strip() for text in trained_text(found, tokenizer)] == [answer + shape.end for answer in answers]
        assert found.notes.ends == {shape.end}
        for document in found:
            if shape.bos and shape.adds_bos:
                assert document.input_ids[0] == tokenizer.bos_token_id
                assert (document.input_ids == tokenizer.bos_token_id).sum() == 1


def what_happens(kind: str, shape: Shape, tokenizer: PreTrainedTokenizerFast) -> str:
    turns, tools = CHATS[kind]
    try:
        found = tokenize(turns, shape, tokenizer, tools=tools)
    except DataError as error:
        reason = str(error).partition(": ")[2]
        if dropped := re.search(r"drops (the .*?)(,|;)", reason):
            return f"refused: drops {re.sub(r' of turn [0-9]+', '', dropped[1])}"
        return f"refused by the template: {reason.rpartition('): ')[2].partition(';')[0].lower()}"
    said = "trained" if len(found) == 1 else f"trained, {len(found)} rows (turns are rewritten)"
    empty = any("empty block" in note for note in found.notes.counts)
    return said + ", empty block masked" * empty


def test_the_table_of_families_in_the_docs_is_what_happens(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    rows = [
        f"| {family} | `{shape.end}` | ".replace("<|", r"<\|").replace("|>", r"\|>")
        + " | ".join(what_happens(kind, shape, tokenizers[family]) for kind in CHATS)
        + " |"
        for family, shape in SHAPES.items()
    ]
    head = [f"| family | an answer ends with | {' | '.join(CHATS)} |", "|" + "---|" * (2 + len(CHATS))]
    table = "\n".join([*head, *rows])
    assert table in TABLE.read_text(encoding="utf-8"), f"{TABLE.name} must hold this table:\n{table}"


SIGNS = ("<|im_end|>", "</s>", "<think>", "{\"k\": 'v'}", "assistant", "\\n", "e\u0301", "x<|im_end|>y", " 31C\n")
SIGN_OF_TEMPLATES = re.compile("</think>")  # some move what stands before it, and write it anew
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SAID = st.lists(st.sampled_from(SIGNS) | UNICODE, min_size=1, max_size=4).map(lambda words: " ".join(words) + ".")


@st.composite
def chats(draw: st.DrawFn) -> tuple[list[dict[str, Any]], Any]:
    """A chat of any length with any of a system turn, tool calls, reasoning and flags, in any Unicode."""
    turns: list[dict[str, Any]] = [{"role": "system", "content": draw(SAID)}] * draw(st.integers(0, 1))
    tools = None
    for _ in range(draw(st.integers(1, 3))):
        turns.append(user(draw(SAID)))
        if draw(st.integers(0, 3)) == 3:
            tools = TOOLS
            arguments = {"city": draw(SAID), "days": draw(st.integers(0, 9)), "sure": draw(st.booleans())}
            turns.append(says("", tool_calls=[{"function": {"name": "weather", "arguments": arguments}}]))
            turns.append({"role": "tool", "content": draw(SAID)})
        answer = says(draw(SAID))
        if draw(st.integers(0, 3)) == 3:
            answer["reasoning_content"] = draw(SAID)
        if draw(st.integers(0, 4)) == 4:
            answer["weight"] = draw(st.integers(0, 1))
        turns.append(answer)
    return turns, tools


def spelled(text: str) -> set[str]:
    """How a template may write a text: as it is, trimmed, as JSON."""
    as_json = {json.dumps(part, ensure_ascii=ascii)[1:-1] for part in (text, text.strip()) for ascii in (False, True)}
    return {text.strip(), text.strip("\n"), *as_json}


PROMPTED_OTHERWISE = ("Qwen3", "SmolLM3", "DeepSeek-R1")
"""There, something of the template stands between the prompt and the answer."""


def choose(shape: Shape, tokenizer: PreTrainedTokenizerFast, *, date: str | None = None) -> ChatTemplate:
    return choose_template(tokenizer, "chatml" if shape.template == "chatml" else None, date=date)


@pytest.mark.parametrize("family", SHAPES)
def test_any_chat_is_shown_whole_and_trained_in_its_answers_or_refused(
    family: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    shape, tokenizer = SHAPES[family], tokenizers[family]
    special = np.asarray(
        tokenizer.all_special_ids + [tokenizer.convert_tokens_to_ids(token) for token in shape.special]
    )
    accepted, refused = 0, list[str]()

    def decode(ids: np.ndarray) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(chats())
    def holds(drawn: tuple[list[dict[str, Any]], Any]) -> None:
        nonlocal accepted
        turns, tools = drawn
        try:
            found = tokenize(turns, shape, tokenizer, tools=tools)
        except DataError as error:
            refused.append(str(error))
            return
        accepted += 1
        rows = [decode(document.input_ids) for document in found]
        answers = [i for i, message in enumerate(turns) if message["role"] == "assistant"]
        trained = [i for i in answers if turns[i].get("weight") != 0]
        shown = len(turns)
        if any("left out" in note and "go on" in note for note in found.notes.counts):  # said: none of it is trained
            shown = trained[-1] + 1
        for index, message in enumerate(turns[:shown]):
            keys = ("content",) if index in answers and index not in trained else ("content", "reasoning_content")
            said = [message[key] for key in keys if key in message]
            said += [call["function"]["arguments"]["city"] for call in message.get("tool_calls", ())]
            for text in [part for whole in said for part in SIGN_OF_TEMPLATES.split(whole)]:
                assert any(spelling in row for row in rows for spelling in spelled(text)), (text, rows)
        spans, before = [], []
        for document in found:
            assert document.trained is not None
            edges = np.flatnonzero(np.diff(document.trained, prepend=False, append=False)).reshape(-1, 2)
            for start, stop in edges:  # a control token is trained where it ends an answer, or opens a tool call
                control = np.flatnonzero(np.isin(document.input_ids[start:stop], special))
                opens = family == "Granite" and list(control) == [0, stop - start - 1]
                assert list(control) == [stop - start - 1] or opens
                spans.append(decode(document.input_ids[start:stop]))
                before.append(decode(document.input_ids[:start]))
            if tokenizer.bos_token_id is not None and shape.adds_bos:
                assert document.input_ids[0] == tokenizer.bos_token_id
                assert (document.input_ids == tokenizer.bos_token_id).sum() == 1
        assert len(spans) == len(trained)
        for index in trained:  # each trained answer is in a trained span, and there are no others
            message = turns[index]
            call = message.get("tool_calls")
            text = call[0]["function"]["arguments"]["city"] if call else message["content"]
            text = SIGN_OF_TEMPLATES.split(text)[-1]
            assert any(spelling in span for span in spans for spelling in spelled(text)), (text, spans)
        if tools is None and family not in PROMPTED_OTHERWISE:
            template = choose(shape, tokenizer, date="2026-01-31")
            for index in trained:  # what is trained begins where the prompt of the answer ends
                prompt = encoding.encode_prompt(read_chat(turns).messages[:index], tokenizer, template=template)
                assert decode(prompt) in before, (index, before)

        if tools is None and not any("reasoning_content" in turn for turn in turns):
            template = choose(shape, tokenizer, date="2026-01-31")
            bos = tokenizer.bos_token or ""
            rows_to = [
                (head + span).removeprefix(bos).removesuffix(shape.end)
                for head, span in zip(before, spans, strict=True)
            ]
            for index in trained:  # and is shown as it is where the chat ends with it
                upto = template.render(read_chat(turns).messages[: index + 1]).removeprefix(bos)
                assert any(upto.startswith(text) and len(upto) - len(text) < 40 for text in rows_to), (upto, rows_to)

    holds()
    assert accepted >= 3
    assert all(re.search(r"drops|refuses this row|0 trained tokens", text) for text in refused), refused


def test_what_the_model_is_asked_is_what_it_was_trained_on(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    for family, tokenizer in tokenizers.items():
        shape = SHAPES[family]
        for question in ("hi", "hi<|im_end|></s>"):
            prompt = encoding.encode_prompt([user(question)], tokenizer, template=choose(shape, tokenizer))
            (row,) = tokenize([user(question), says("Hello.")], shape, tokenizer, date=None)
            assert row.trained is not None
            start = int(row.trained.argmax())
            if family not in PROMPTED_OTHERWISE:
                assert tokenizer.decode(prompt) == tokenizer.decode(row.input_ids[:start]), family


def test_what_a_template_drops_is_refused_or_allowed_and_counted(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    shape, tokenizer = SHAPES["ChatML (SmolLM2)"], tokenizers["ChatML (SmolLM2)"]
    turns, _ = CHATS["reasoning"]
    with pytest.raises(DataError, match=r"drops the reasoning of turn 2.*data\.template_drops=allow"):
        tokenize(turns, shape, tokenizer)
    with pytest.raises(DataError, match="drops the tool schemas"):
        tokenize(CHATS["single"][0], shape, tokenizer, tools=TOOLS)
    found = tokenize(turns, shape, tokenizer, tools=TOOLS, template_drops="allow")
    assert trained_text(found, tokenizer) == ["b<|im_end|>", "d<|im_end|>"]
    assert sum("loses" in note or "lose" in note for note in found.notes.counts) == 2
    call = [user("W?"), says("", tool_calls=[{"function": {"name": "f", "arguments": {"x": 1}}}])]
    with pytest.raises(DataError, match="0 trained tokens: the chat template drops the tool calls of turn 2"):
        tokenize(call, shape, tokenizer, template_drops="allow")
