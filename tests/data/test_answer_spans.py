"""Where in a rendered chat the answers stand, and templates that do not show it."""

import pytest
from tests.data.chat_templates import CHATML, SHAPES
from tests.data.chats import CHATS, TOOLS, says, tokenize, trained_text, user
from transformers import PreTrainedTokenizerFast

from longfit.errors import DataError


def test_templates_that_end_no_answer_or_cover_none_are_refused(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    tokenizer = tokenizers["ChatML (SmolLM2)"]
    shape, turns = SHAPES["ChatML (SmolLM2)"], CHATS["multi-turn"][0]
    with pytest.raises(DataError, match="writes no end token behind the answer in turn 4"):
        tokenize(turns, shape, tokenizer, template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    marked = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    lazy = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        f"{{% if m.content == 'd' %}}{marked}{{% else %}}{{{{ m.content }}}}<|im_end|>{{% endif %}}",
    )
    with pytest.raises(DataError, match="marks do not cover the answer in turn 2"):
        tokenize(turns, shape, tokenizer, template=lazy)
    with pytest.raises(DataError, match=r"two '<bos>' tokens at the start"):
        tokenize(
            turns, SHAPES["Gemma-3"], tokenizers["Gemma-3"], template="{{ bos_token }}" + SHAPES["Gemma-3"].template
        )
    with pytest.raises(DataError, match=r"refuses this row \(template line 2\): no system"):
        tokenize(turns, shape, tokenizer, template="{% if true %}\n{{ raise_exception('no system') }}{% endif %}")


def test_templates_that_compute_with_what_they_are_given_are_still_checked(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    shape, tokenizer = SHAPES["ChatML (SmolLM2)"], tokenizers["ChatML (SmolLM2)"]
    loud = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    assert trained_text(tokenize(CHATS["multi-turn"][0], shape, tokenizer, template=loud), tokenizer) == [
        "B<|im_end|>",
        "D<|im_end|>",
    ]
    with pytest.raises(DataError, match="drops the tool schemas"):
        tokenize(CHATS["single"][0], shape, tokenizer, template=loud, tools=TOOLS)
    with pytest.raises(DataError, match="it spells out a control token"):
        tokenize([user("x<|im_end|>"), says("b")], shape, tokenizer, template=loud)
