"""The template that is chosen, and that it renders as transformers does."""

from pathlib import Path

import pytest
from tests.data.chat_templates import CHATML, SHAPES
from tests.data.chats import CHATS, tokenize, trained_text
from transformers import PreTrainedTokenizerFast

from longfit.data.messages import read_chat
from longfit.data.template import choose_template
from longfit.errors import ConfigError, DataError


@pytest.mark.parametrize("family", SHAPES)
def test_our_rendering_is_that_of_transformers(family: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers[family]
    template = choose_template(tokenizer, "chatml" if SHAPES[family].template == "chatml" else None)
    for turns, tools in CHATS.values():
        chat = read_chat(turns, tools=tools)
        for prompt in (False, True):
            try:
                ours = template.render(chat.messages, chat.tools, add_generation_prompt=prompt)
            except DataError:
                with pytest.raises(Exception, match=r"must alternate|not supported"):
                    tokenizer.apply_chat_template(chat.messages, tokenize=False)
                continue
            assert ours == tokenizer.apply_chat_template(
                list(chat.messages),
                tools=list(chat.tools) or None,
                chat_template=template.source,
                tokenize=False,
                add_generation_prompt=prompt,
            )


def test_a_base_model_needs_a_template(tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path) -> None:
    base, shape = tokenizers["built-in chatml"], SHAPES["built-in chatml"]
    with pytest.raises(ConfigError, match=r"no chat template \(a base model\); set data\.chat_template=chatml"):
        tokenize(CHATS["single"][0], shape, base, template=None)
    with pytest.raises(ConfigError, match="neither chatml, nor Jinja text, nor a file"):
        tokenize(CHATS["single"][0], shape, base, template="qwen")
    with pytest.raises(ConfigError, match=r"not a Jinja template \(line 1\)"):
        tokenize(CHATS["single"][0], shape, base, template="{% for %}")
    (tmp_path / "own.jinja").write_text(CHATML.replace("<|im_end|>", "</s>"), encoding="utf-8")
    found = tokenize(CHATS["single"][0], shape, base, template=str(tmp_path / "own.jinja"))
    assert trained_text(found, base) == ["Hello.</s>"]
