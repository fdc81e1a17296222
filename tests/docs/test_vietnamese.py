"""The Vietnamese pages keep step with the English ones: the same commands, and the same numbers in their tables."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAIRS = {"README.md": "docs/vi/README.md", "docs/tutorial/a-book-on-a-laptop.md": "docs/vi/mot-cuon-sach.md"}


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)


def numbers(text: str) -> list[str]:
    """The numbers of all table rows, in order."""
    rows = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    return re.findall(r"\d[\d,.]*", "\n".join(rows))


@pytest.mark.parametrize("english", PAIRS)
def test_commands_and_numbers_are_the_same(english: str) -> None:
    original = (ROOT / english).read_text(encoding="utf-8")
    translation = (ROOT / PAIRS[english]).read_text(encoding="utf-8")
    if english == "README.md":  # its first half is translated
        original = original[: original.index("\n## Use it")]
    assert blocks(translation) == blocks(original)
    assert numbers(translation) == numbers(original)


def test_what_a_sentence_says_of_the_demo_is_the_same() -> None:
    original, translation = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", PAIRS["README.md"]))
    said = original[original.index("![") : original.index("\n## ")]
    told = translation[translation.index("![") : translation.index("\n## ")]
    figures = re.compile(r"\d[\d,.]*\d|\d")
    assert figures.findall(told) == figures.findall(said)
