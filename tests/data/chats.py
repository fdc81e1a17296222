"""Chats that many tests encode, and what of them is trained."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tests.data.chat_templates import Shape
from transformers import PreTrainedTokenizerFast

from longfit.data.document import Document
from longfit.data.messages import read_chat
from longfit.data.tokenizing import TokenizedSet, tokenize_documents

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "SCHEMA",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = says("", tool_calls=[{"function": {"name": "weather", "arguments": {"city": "Hue"}}}])


CHATS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "single": ([user("hi"), says("Hello.")], None),
    "multi-turn": ([user("a"), says("b"), user("c"), says("d")], None),
    "tools": ([user("W?"), CALL, {"role": "tool", "content": "31C"}, says("It is 31C.")], TOOLS),
    "reasoning": ([user("a"), says("b", reasoning_content="h1"), user("c"), says("d", reasoning_content="h2")], None),
    "system": ([{"role": "system", "content": "BE KIND"}, user("a"), says("b")], None),
}


def tokenize(
    turns: Sequence[Any], shape: Shape, tokenizer: PreTrainedTokenizerFast, *, tools: Any = None, **options: Any
) -> TokenizedSet:
    chat = read_chat(turns, tools=tools)
    stop_ids = [tokenizer.convert_tokens_to_ids(token) for token in shape.stops]
    template = shape.template if shape.template == "chatml" else None
    options = {"template": template, "date": "2026-01-31", "stop_ids": stop_ids, **options}
    return tokenize_documents([Document("a:1", chat=chat)], tokenizer, **options)


def trained_text(found: TokenizedSet, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The runs of trained tokens, decoded."""
    texts = []
    for document in found:
        assert document.trained is not None
        edges = np.flatnonzero(np.diff(document.trained, prepend=False, append=False))
        texts += [tokenizer.decode(document.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]
    return texts
