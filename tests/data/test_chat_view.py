"""Each character of a rendered chat is shown as trained, masked or added; what the template drops is named."""

from tests.data.chat_templates import SHAPES, make_tokenizer

from longfit.data.chat_encoder import ChatEncoder
from longfit.data.chat_view import view_chat
from longfit.data.messages import read_chat

TURNS = [
    {"role": "user", "content": "what?"},
    {"role": "assistant", "content": "Five.", "reasoning_content": "hmm"},
]


def test_every_part_of_a_chat_has_its_fate() -> None:
    encoder = ChatEncoder(make_tokenizer(SHAPES["Qwen3"]))
    (view,) = view_chat(read_chat(TURNS), encoder)
    assert [(part.kind, part.text) for part in view] == [
        ("added", "<|im_start|>user\n"),
        ("masked", "what?"),
        ("added", "<|im_end|>\n<|im_start|>assistant\n"),
        ("trained", "<think>\nhmm\n</think>\n\nFive.<|im_end|>"),
        ("added", "\n"),
    ]


def test_what_a_template_drops_is_shown() -> None:
    encoder = ChatEncoder(make_tokenizer(SHAPES["Phi-3"]))
    (view,) = view_chat(read_chat(TURNS), encoder)
    assert [part.text for part in view if part.kind == "dropped"] == ["the reasoning of turn 2: hmm"]
    assert [part.text for part in view if part.kind == "trained"] == ["Five.<|end|>"]
