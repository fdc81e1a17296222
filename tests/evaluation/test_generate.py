"""Continuations against transformers' own ``generate``, streaming, and what does not fit."""

import pytest
import torch
from tests.model_folders import byte_tokenizer, llama

from longfit.errors import ConfigError, ContextError
from longfit.evaluation.generate import Conversation, _choose, _settled, end_tokens, generate, require_space
from longfit.evaluation.reader import Reader

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def model():
    return llama(dtype=torch.float64).eval()  # untied: a tied random model repeats its last byte


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def ids_of(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text).input_ids)


def test_greedy_is_that_of_transformers(model, tokenizer) -> None:
    prompt = ids_of(tokenizer, "The road goes ever on")
    expected = model.generate(
        prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=30, do_sample=False, pad_token_id=0
    )[0, len(prompt) :]
    pieces = list(generate(Reader(model, chunk_tokens=5), tokenizer, prompt, max_new_tokens=30))
    assert len(expected) == 30  # it did not end early
    assert "".join(pieces) == tokenizer.decode(expected)
    assert len(pieces) > 10  # it came in pieces


def test_pieces_are_whole_characters(tokenizer) -> None:
    text = "naïve 木 🌳 end"
    made = tokenizer(text).input_ids
    shown = 0
    for count in range(1, len(made) + 1):
        decoded = tokenizer.decode(made[:count])
        end = _settled(decoded, None)
        assert end >= shown
        shown = end
        assert text.startswith(decoded[:end])
    assert shown == len(text)
    assert _settled("abc\nQue", "\nQuestion:") == 3
    assert _settled("abc\nQuo", "\nQuestion:") == 7
    assert _settled("abc\n", "\nQuestion:") == 3


class Script:
    """Stands in for a reader: says the given tokens one after the other, whatever it is asked."""

    def __init__(self, model, said: list[int]) -> None:
        self.model, self.said, self.num_read = model, said, 0

    def read(self, token_ids: torch.Tensor, *, keep: int = 1, on_progress=None) -> torch.Tensor:
        self.num_read += 1
        logits = torch.zeros(1, 258)
        logits[0, self.said[self.num_read - 1]] = 9
        return logits


def test_it_ends_where_the_model_or_the_caller_says(model, tokenizer) -> None:
    said, prompt = tokenizer("yes\nno\nQuestion: more").input_ids, ids_of(tokenizer, "x")
    eos = tokenizer.eos_token_id
    assert "".join(generate(Script(model, [*said[:3], eos, *said]), tokenizer, prompt, max_new_tokens=40)) == "yes"
    stopped = generate(Script(model, said), tokenizer, prompt, max_new_tokens=40, stop="\nQuestion:")
    assert "".join(stopped) == "yes\nno"
    assert "".join(generate(Script(model, said), tokenizer, prompt, max_new_tokens=5)) == "yes\nn"
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model, tokenizer) == {7, 9, eos}


def test_sampling_draws_from_the_nucleus() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.25, 0.15])
    draw = torch.Generator().manual_seed(0)
    drawn = torch.tensor([_choose(probabilities.log(), 1.0, 0.7, draw) for _ in range(3000)])
    shares = drawn.bincount(minlength=4) / 3000
    # 0.5 and 0.25 reach 0.75; a share of 2/3 over 3,000 draws has a standard deviation of 0.0086: five of them
    torch.testing.assert_close(shares, torch.tensor([0, 2 / 3, 1 / 3, 0]), rtol=0, atol=0.043)
    assert {_choose(probabilities.log(), 1.0, 0.4, draw) for _ in range(50)} == {1}
    cold = [_choose(probabilities.log(), 0.05, 1.0, draw) for _ in range(50)]  # 2^20 times likelier
    assert set(cold) == {1}
    assert _choose(probabilities.log(), 0.0, 1.0, draw) == 1


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_second_question_reads_only_what_is_new(model, tokenizer, template, monkeypatch: pytest.MonkeyPatch) -> None:
    model.config.max_position_embeddings = 1000
    tokenizer.chat_template = template
    document, read = "It was a dark and stormy night. " * 10, []
    model.model.embed_tokens.register_forward_pre_hook(lambda layer, args: read.append(args[0].shape[1]))
    talk = Conversation(model, tokenizer, document=document)
    size, progress = len(talk.prompt("When?")), []
    first = "".join(talk.ask("When?", max_new_tokens=4, on_progress=lambda *call: progress.append(call)))
    assert progress == [(size, size)]
    assert sum(read) > len(document)
    read.clear()
    second = "".join(talk.ask("And then?", max_new_tokens=4))
    assert sum(read) < 80
    assert [answer for _, answer in talk.turns] == [first.strip(), second.strip()]

    fresh = Conversation(model, tokenizer, document=document)
    fresh.turns = [("When?", talk.turns[0][1])]
    assert "".join(fresh.ask("And then?", max_new_tokens=4)) == second  # as if all of it were read at once
    shown = tokenizer.decode(talk.prompt("Why?"))
    assert shown.count(document.strip()) == 1
    assert shown.index("When?") < shown.index("And then?") < shown.index("Why?")
    assert shown.endswith("Question: Why?\nAnswer:" if template is None else "<|user|>Why?\n<|assistant|>")


def test_what_does_not_fit_is_refused_with_its_numbers(model, tokenizer) -> None:
    talk = Conversation(model, tokenizer, document="x" * 60)  # the model takes 64
    with pytest.raises(ContextError, match=r"more than the model's context of 64; nothing is cut in silence"):
        next(talk.ask("What?", max_new_tokens=10))
    require_space(54, 10, 64)
    with pytest.raises(
        ContextError,
        match=r"55 tokens and the answer may take 10: 1 more than .* allow an answer of at most 9 tokens, .* of 65",
    ):
        require_space(55, 10, 64)
    with pytest.raises(ContextError, match=r"64; nothing is cut in silence: give a shorter text, or train"):
        require_space(64, 1, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"temperature": -1.0}, "try 0.7"),
        ({"top_p": 0.0}, "top_p 0.0"),
    ],
)
def test_errors(model, tokenizer, settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        next(generate(Reader(model), tokenizer, ids_of(tokenizer, "x"), **settings))
