"""Pages as a reader sees them."""

import io

import pytest

from longfit.data import html
from longfit.data.html import html_text, read_html
from longfit.errors import DataError


def test_html_gives_what_a_reader_sees() -> None:
    page = (
        b"<html><head><title>T</title><style>p {}</style><script>if (a < b) x()</script></head><body><h1>Head</h1>\n"
        b"<p>Some <b>bold</b>\n  words &amp; <i>more</i>.</p><pre>a\n  b</pre><p>end<br>line</p></body></html>"
    )
    assert read_html(io.BytesIO(page)) == "T\n\nHead\n\nSome bold words & more.\n\na\n  b\n\nend\nline"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<table><tr><th>Name<th>Age<tr><td>Lan</td> <td>31</td></tr></table>", "Name\tAge\nLan\t31"),
        ("<ul><li>x<li>y</ul>z", "x\ny\n\nz"),
        ("a<p hidden>h<b>b</b>h<p>c<div style='color: red; display:none'>d<p>e</p></div>f", "a\n\nc\nf"),
        ("<ul><li hidden>h<li>x</ul><p hidden>h</div>y", "x\n\ny"),
        ("a<noscript>n</noscript><svg/>b<svg><text>t</text></svg>c<template><p>t</p></template>d", "abcd"),
        ("<select><option>o<option>p</select><textarea>t</textarea>", "o\n\np\n\nt"),
        ("<p>text<script>var a = 1; if (a<b) {}", "text"),
    ],
)
def test_cells_and_items_are_apart_and_what_is_hidden_is_gone(page: str, text: str) -> None:
    assert [line for line in html_text(page).split("\n") if line] == [line for line in text.split("\n") if line]


def test_a_page_is_read_in_the_encoding_that_it_declares() -> None:
    page = "<head><meta charset='iso-8859-1'></head>caf\u00e9 \u20ac".encode("cp1252")
    assert read_html(io.BytesIO(page)) == "café €"
    with pytest.raises(DataError, match="not utf-8"):
        read_html(io.BytesIO(page.replace(b"iso-8859-1", b"utf-8")))


@pytest.mark.parametrize(
    "endless", ["<!--" * 200_000, "<![CDATA[" * 100_000, "<svg>" + "<g>" * 30_000 + "</x>" * 30_000]
)
def test_what_is_never_closed_is_not_looked_for_for_ever(endless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "LEAST_S", 0.05)
    monkeypatch.setattr(html, "S_PER_MIB", 0.0)
    with pytest.raises(DataError, match=r"takes more than 0 s of a processor, out of proportion to its [\d,]+ bytes"):
        html_text(endless)


def test_spaces_around_tabs_are_taken_away_in_one_pass() -> None:
    code = "  if x:" + " " * 200_000 + "y"  # an expression that looks for a tab takes a minute for it
    assert html_text(f"<pre>{code}</pre>") == code
    assert html_text("<pre>  a \t b\t \tc </pre>") == "  a\tb\t\tc"
