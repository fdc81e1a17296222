"""A tokenizer for each shape of chat template; making them all takes a second."""

import pytest
from tests.data.chat_templates import SHAPES, make_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {name: make_tokenizer(shape) for name, shape in SHAPES.items()}
