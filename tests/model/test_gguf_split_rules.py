"""A file's name for how texts are split: followed where it is known, refused where it is not."""

import json

import pytest
from tests.model_folders import byte_tokenizer

from longfit.errors import ModelError
from longfit.model.gguf_split_rules import PRE_NAMES, follow_rule, split_rule


@pytest.mark.parametrize(("rule", "name"), PRE_NAMES.items(), ids=PRE_NAMES.values())
def test_a_known_rule_is_followed_whatever_was_read(rule: object, name: str) -> None:
    tokenizer = byte_tokenizer()
    follow_rule(tokenizer, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}, "a.gguf")
    assert split_rule(json.loads(tokenizer.backend_tokenizer.to_str())) == (rule, [])
    text = "Don't say 12345 twice,\n\nplease!  \u4e2d\u6587"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_digits_stand_alone_where_the_file_says_so() -> None:
    def pieces(name: str) -> list[str]:
        tokenizer = byte_tokenizer()
        follow_rule(tokenizer, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}, "a.gguf")
        return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1234")]

    space = "\u0120"  # as byte-level tokenizers write it
    assert pieces("gpt-2") == ["in", f"{space}1234"]
    assert pieces("smollm") == ["in", space, "1", "2", "3", "4"]
    assert pieces("llama-bpe") == ["in", space, "123", "4"]


@pytest.mark.parametrize("name", ["glm4", "made-up", None])
def test_an_unknown_rule_is_refused_by_name(name: str | None) -> None:
    with pytest.raises(ModelError, match=rf"{name!r}: known are gpt-2, llama-bpe, qwen2, smollm, tekken"):
        follow_rule(byte_tokenizer(), {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}, "a.gguf")


def test_sentencepiece_has_no_such_rule() -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    follow_rule(tokenizer, {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}, "a.gguf")
    assert tokenizer.backend_tokenizer.to_str() == before
