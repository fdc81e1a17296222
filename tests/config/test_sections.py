"""The settings, their units and what each says of itself."""

import pytest
from tests.config.test_run import NEEDED

from longfit.config import load_config
from longfit.config.sections import known_keys, meaning, parse_bytes, parse_tokens
from longfit.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "tokens"), [("32k", 32_768), ("100_000", 100_000), ("1m", 1_048_576), ("1.5k", 1536), (8192, 8192)]
)
def test_tokens_parse(text: object, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("512MiB", 2**29), ("7", 7)]
)
def test_bytes_parse(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


def test_every_setting_says_what_it_does() -> None:
    assert [key for key in known_keys() if not meaning(key).strip().endswith(".")] == []


def test_the_largest_amounts_are_those_of_a_machine() -> None:
    for text in ("9" * 400 + "GiB", "2000000TiB"):
        with pytest.raises(ConfigError, match="no more than any machine has"):
            load_config(overrides=[f"optim.budget={text}"], flags=NEEDED)
