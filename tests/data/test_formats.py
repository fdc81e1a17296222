"""Rows of every common shape become the same messages; exactly what the assistant says is trained."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longfit.data import formats
from longfit.data.packing import IGNORED, pack, tokenize_documents
from longfit.data.sources import Document
from longfit.errors import ConfigError, DataError

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": " Now we stop."},
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same with the author's marks, as some published templates have them.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops what earlier answers said before "=>", as templates of reasoning models do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('=>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE as Llama 3, Qwen and SmolLM have it, trained in a moment."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["Hello there. And now we stop, Hi. " * 5, "system user assistant\n\n" * 5], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = TEMPLATE
    return made


def trained_text(chat: formats.EncodedChat, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The runs of trained tokens, decoded."""
    edges = np.flatnonzero(np.diff(chat.trained, prepend=False, append=False))
    return [tokenizer.decode(chat.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]


QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"messages": [QUESTION, ANSWER], "text": "rendered"}, "messages", [QUESTION, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "sharegpt",
            [{"role": "system", "content": "s"}, QUESTION, ANSWER],
        ),
        ({"conversations": [QUESTION, ANSWER]}, "sharegpt", [QUESTION, ANSWER]),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [QUESTION, ANSWER]),
        (
            {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]]},
            "alpaca",
            [QUESTION, ANSWER, {"role": "user", "content": "q\n\ni"}, ANSWER],
        ),
        ({"prompt": "q", "completion": "a"}, "prompt-completion", [QUESTION, ANSWER]),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, "prompt-completion", [QUESTION, ANSWER]),
        (
            {"question": "q", "answer": "a", "context": "book"},
            "question-answer",
            [{"role": "user", "content": "book\n\nq"}, ANSWER],
        ),
        (
            {"messages": [{**QUESTION, "content": [{"type": "text", "text": "q"}], "name": None}, ANSWER]},
            "messages",
            [QUESTION, ANSWER],
        ),
    ],
)
def test_rows_of_every_shape_become_messages(row: dict[str, Any], name: str, messages: list[dict[str, str]]) -> None:
    shape = formats.recognise(row)
    assert shape.name == name
    assert formats.row_content(row, shape) == tuple(messages)


def test_text_rows_and_named_columns_become_text() -> None:
    assert formats.row_content({"text": "x", "id": 1}, formats.recognise({"text", "id"})) == "x"
    named = formats.recognise(["body", "messages"], text_column="body")
    assert formats.row_content({"body": None}, named) == ""
    with pytest.raises(DataError, match=r"text_column 'txt' is not among the columns 'body'"):
        formats.recognise(["body"], text_column="txt")
    with pytest.raises(DataError, match=r"columns 'body' are not recognised; known: messages"):
        formats.recognise(["body"])


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([QUESTION], "no assistant turn among 1 turns"),
        ([QUESTION, {"role": "assistant", "content": " "}], "turn 2: the assistant's answer is empty"),
        ([{"role": "bot", "content": "x"}], "turn 1: unknown role 'bot'; allowed: system, developer, user"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], "turn 1: content is list, not text"),
        ([], "column 'messages' holds an empty list"),
        ("text", "column 'messages' holds str; expected a list of turns"),
        (["text"], "a turn is str, not an object"),
    ],
)
def test_chats_that_teach_nothing_are_refused(turns: Any, message: str) -> None:
    row = {"messages": turns}
    with pytest.raises(DataError, match=message):
        formats.row_content(row, formats.recognise(row))


def test_unknown_sharegpt_speakers_are_refused() -> None:
    row = {"conversations": [{"from": "alice", "value": "q"}]}
    with pytest.raises(DataError, match="unknown role 'alice' in 'from'; allowed: human"):
        formats.row_content(row, formats.recognise(row))


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_exactly_the_answers_and_their_end_tokens_are_trained(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    chat = formats.encode_chat(CHAT, tokenizer, template=template)
    assert trained_text(chat, tokenizer) == ["Hi.<|im_end|>", " Now we stop.<|im_end|>"]
    assert chat.input_ids.tolist() == tokenizer.apply_chat_template(CHAT, chat_template=template)["input_ids"]
    last = formats.encode_chat(CHAT, tokenizer, template=template, train_turns="last")
    assert trained_text(last, tokenizer) == [" Now we stop.<|im_end|>"]


def test_the_untrained_prompt_is_what_the_model_will_be_given(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = formats.encode_chat(CHAT, tokenizer, template=TEMPLATE)
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True)["input_ids"]
    assert int(chat.trained.argmax()) == len(prompt)
    assert chat.input_ids[: len(prompt)].tolist() == prompt


def test_a_token_shared_by_prompt_and_answer_is_not_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    newline = tokenizer.encode("\n\n")
    assert len(newline) == 1  # the header's line break and the answer's melt into one token
    chat = formats.encode_chat([QUESTION, {"role": "assistant", "content": "\n\nHi."}], tokenizer, template=TEMPLATE)
    assert newline[0] in chat.input_ids[~chat.trained]
    assert trained_text(chat, tokenizer) == ["\nHi.<|im_end|>"]


class Slow:
    """The same tokenizer without offsets, as those written in Python are."""

    is_fast = False

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self.fast = fast

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        return self.fast(text, add_special_tokens=add_special_tokens)


def test_tokenizers_without_offsets_agree_or_say_they_cannot_tell(tokenizer: PreTrainedTokenizerFast) -> None:
    slow: Any = Slow(tokenizer)
    for template in (TEMPLATE, MARKED):
        fast_chat = formats.encode_chat(CHAT, tokenizer, template=template)
        slow_chat = formats.encode_chat(CHAT, slow, template=template)
        assert slow_chat.trained.tolist() == fast_chat.trained.tolist()
    with pytest.raises(DataError, match="share a token with the text around it"):
        formats.encode_chat([QUESTION, {"role": "assistant", "content": "\n\nHi."}], slow, template=TEMPLATE)


def test_templates_that_rewrite_earlier_turns_are_refused_or_train_the_last(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [QUESTION, {"role": "assistant", "content": "think=>Hi."}] * 2
    with pytest.raises(DataError, match=r"rewrites turn 2 when later turns follow.*train_turns='last'"):
        formats.encode_chat(turns, tokenizer, template=FORGETFUL)
    last = formats.encode_chat(turns, tokenizer, template=FORGETFUL, train_turns="last")
    assert trained_text(last, tokenizer) == ["think=>Hi.<|im_end|>"]


def test_template_errors_name_the_line_of_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    strict = "{% for m in messages %}\n{% if m.role == 'system' %}\n{{ raise_exception('no system') }}{% endif %}"
    strict += "{% endfor %}"
    with pytest.raises(DataError, match=r"refuses this row \(template line 3\): no system"):
        formats.encode_chat(CHAT, tokenizer, template=strict)


def test_marks_that_miss_an_answer_and_chats_that_begin_with_one_are_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    lazy = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    with pytest.raises(DataError, match="marks cover 1 of 2 answers"):
        formats.encode_chat(CHAT, tokenizer, template=lazy)
    with pytest.raises(DataError, match="the chat begins with the assistant"):
        formats.encode_chat([ANSWER, QUESTION, ANSWER], tokenizer, template=TEMPLATE)
    with pytest.raises(DataError, match=r"two '<\|endoftext\|>' tokens at the start"):
        formats.encode_chat(CHAT, tokenizer, template="{{ bos_token + bos_token }}" + TEMPLATE)
    with pytest.raises(DataError, match="0 trained tokens"):
        formats.encode_chat([QUESTION, ANSWER], tokenizer, template="{{ messages[0].content }}")


def test_a_base_model_needs_a_template_and_chatml_teaches_it_to_stop(tokenizer: PreTrainedTokenizerFast) -> None:
    base = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    documents = [Document("a:1", messages=tuple(CHAT))]
    with pytest.raises(ConfigError, match=r"no chat template \(a base model\); set chat_template='chatml'"):
        tokenize_documents(documents, base)
    with pytest.raises(
        DataError, match=r"no answer ends with the end token '<\|endoftext\|>'.*answers end with .*im_end"
    ):
        tokenize_documents(documents, base, template=TEMPLATE)
    (chat,) = tokenize_documents(documents, base, template="chatml")
    assert chat.trained is not None
    assert (chat.input_ids[chat.trained] == base.eos_token_id).sum() == 2


def test_documents_become_windows_with_a_real_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [
        Document("a", text="Hello there. " * 9),
        Document("b", text="Now <|im_start|> we stop."),
        Document("c", text="ümlaut \U0001f600"),
    ]
    done: list[int] = []
    tokenized = tokenize_documents(documents, tokenizer, on_document=done.append)
    assert done[-1] == 3
    assert [document.num_special for document in tokenized] == [0, 1, 0]
    packed = pack(tokenized, context=32, eos_token_id=tokenizer.eos_token_id)
    texts = []
    for window in (packed[i] for i in range(len(packed))):
        starts = np.flatnonzero(window["position_ids"].numpy() == 0)
        texts += [tokenizer.decode(piece) for piece in np.split(window["input_ids"].numpy(), starts[1:])]
        assert (window["labels"].numpy()[starts] == IGNORED).all()
    assert sorted(texts)[-2:] == ["Now <|im_start|> we stop.<|im_end|>", "ümlaut \U0001f600<|im_end|>"]
    assert "".join(sorted(texts, key=len, reverse=True)[:1]).startswith("Hello there. ")


def test_rows_that_cannot_be_tokenised_are_all_named(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = [Document(f"a:{i}", messages=(ANSWER, QUESTION, ANSWER)) for i in range(12)]
    with pytest.raises(DataError) as caught:
        tokenize_documents([*bad, Document("good", messages=tuple(CHAT))], tokenizer)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("a:0: the chat begins with the assistant")
    assert lines[-1] == "... and 2 more rows"
