"""The page: complete, self-contained, and the same numbers everywhere."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from longfit.evaluation.compare import Comparison, compare
from longfit.evaluation.report import number, perplexity_table, summary, write_report


@pytest.fixture(scope="module")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    copy = shutil.copytree(run, tmp_path_factory.mktemp("report") / "a <b>bold & run")
    comparison = compare(copy, trials=1, device=torch.device("cpu"))
    return comparison, write_report(comparison, command="longfit eval 'a <b>bold & run'")


class Page(HTMLParser):
    """Tags that must close do, in order; words and attributes are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href"):
                self.links.append(str(value))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_but_a_browser(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert text.count("<svg") == 3  # perplexity, passkeys, training
    # pictures share no names, or one would draw with another's parts
    assert {name.partition("-")[0] for name in page.ids} == {"perplexity", "passkey", "training"}
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert all(link.startswith("#") for link in page.links)
    assert "<script" not in text
    assert "@import" not in text
    assert "<b>bold" not in text
    assert "longfit eval 'a <b>bold & run'" in page.text
    assert "native context 64" in page.text  # text of a picture
    for line in summary(comparison):
        assert line in page.text
    for row in perplexity_table(comparison):
        assert all(cell in page.text for cell in row)


def test_numbers_and_pictures_lie_beside_it(made: tuple[Comparison, Path]) -> None:
    comparison, path = made
    stored = json.loads((path.parent / "report.json").read_text())
    assert [state["long"]["perplexity"] for state in stored["states"]] == [
        state.long.perplexity for state in comparison.states
    ]
    assert stored["commands"][1].startswith("longfit train ")
    for name in ("perplexity", "passkey", "training"):
        picture = (path.parent / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000
    before = path.read_text()
    assert write_report(comparison, command="longfit eval 'a <b>bold & run'") == path
    assert re.sub(r"\d+ s,", "", path.read_text()) == re.sub(r"\d+ s,", "", before)  # the same bytes again


def test_numbers_for_people() -> None:
    shown = [number(value) for value in (4.567, 99.99, 1234.6, 2.5e8, float("inf"), None)]
    assert shown == ["4.57", "99.99", "1,235", "2.5e+08", "inf", "-"]
