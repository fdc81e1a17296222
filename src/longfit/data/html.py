"""The text that a reader of a web page sees: no tags, scripts, styles or hidden parts; cells and list items apart.

Blocks stand on lines of their own, cells of a row are parted by tabs, `<pre>` is left as it is. What this is not: a
renderer; style sheets are not read, only the `hidden` attribute and a `display: none` written on the element itself.
"""

import codecs
import re
from html.parser import HTMLParser
from typing import BinaryIO

from longfit.data.readers import decode_text
from longfit.files.expansion import ProcessorTime

UNSEEN = frozenset({"script", "style", "template", "svg", "noscript", "iframe", "object", "canvas"})
BLOCKS = frozenset(
    """address article aside blockquote body br caption dd details dialog div dl dt fieldset figcaption figure footer
    form h1 h2 h3 h4 h5 h6 header hr html legend li main nav ol optgroup option p pre section select summary table tbody
    textarea tfoot thead title tr ul""".split()  # noqa: SIM905 (forty lines otherwise)
)
CELLS = frozenset({"td", "th"})
VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())  # noqa: SIM905
CLOSED_BY_SIBLING = frozenset({"li", "td", "th", "tr", "option", "dd", "dt"})
DECLARED = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w-]+)|<\?xml[^>]+encoding\s*=\s*["']([\w-]+)""", re.I)
LEAST_S, S_PER_MIB = 10.0, 4.0  # of a processor; a page takes a second for a MiB
EVENTS_A_CHECK = 64
UNDISPLAYED = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)


def read_html(stream: BinaryIO, *, encoding: str | None = None) -> str:
    """Read a page; its encoding is the one named, else that of its byte order mark, else what the page declares.

    Raises: DataError: as `decode_text`.
    """
    data = stream.read()
    return html_text(decode_text(data, encoding=encoding or _declared(data)))


def html_text(page: str) -> str:
    """Take the visible text out of a page.

    Raises: DataError: it takes longer than a page of its size does.
    """
    extractor = _VisibleText(ProcessorTime(len(page), least_s=LEAST_S, s_per_mib=S_PER_MIB))
    extractor.feed(page.replace("\r\n", "\n").replace("\r", "\n"))
    extractor.close()
    return extractor.text()


def _declared(data: bytes) -> str | None:
    """The encoding that the head of a page names; browsers read latin-1 as its superset cp1252."""
    found = DECLARED.search(data[:2048])
    if found is None or data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return None
    name = (found[1] or found[2]).decode("ascii").lower()
    try:
        name = codecs.lookup(name).name
    except LookupError:
        return None
    if name == "utf-8" or name.startswith(("utf-16", "utf-32")):  # a page whose head can be read is not UTF-16
        return None
    return "cp1252" if name in ("iso8859-1", "ascii") else name


class _VisibleText(HTMLParser):
    """Collect what a reader of the page would see."""

    def __init__(self, time: ProcessorTime) -> None:
        super().__init__(convert_charrefs=True)
        self._time, self._num_events = time, 0
        self._pieces: list[str] = []
        self._unseen: list[str] = []  # the open elements from the outermost unseen one inwards
        self._preformatted = 0
        self._cell_before = False  # of this row

    def _count(self) -> None:
        self._num_events += 1
        if self._num_events % EVENTS_A_CHECK == 0:
            self._time.check()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._count()
        if self._unseen and (
            (tag == self._unseen[0] and tag in CLOSED_BY_SIBLING) or (self._unseen[0] == "p" and tag in BLOCKS)
        ):
            self._unseen.clear()
        given = dict(attrs)
        if self._unseen or tag in UNSEEN or "hidden" in given or UNDISPLAYED.search(given.get("style") or ""):
            if not self._unseen and tag in BLOCKS:
                self._pieces.append("\n")
            if tag not in VOID:
                self._unseen.append(tag)
            return
        self._preformatted += tag == "pre"
        if tag in BLOCKS:
            self._pieces.append("\n")
            self._cell_before = False
        elif tag in CELLS:
            self._pieces.append("\t" * self._cell_before)
            self._cell_before = True

    def handle_endtag(self, tag: str) -> None:
        self._count()
        if self._unseen:
            if tag in self._unseen:
                del self._unseen[len(self._unseen) - 1 - self._unseen[::-1].index(tag) :]
            elif tag in BLOCKS and self._unseen[0] not in UNSEEN:  # an element around it ends, so it does
                self._unseen.clear()
            return
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        if tag in BLOCKS:
            self._pieces.append("\n")

    def handle_data(self, data: str) -> None:
        self._count()
        if self._unseen:
            return
        if self._preformatted:
            self._pieces.append(data)
            return
        words = " ".join(data.split())
        self._pieces.append(" " * data[:1].isspace() + words + " " * (bool(words) and data[-1:].isspace()))

    def text(self) -> str:
        """Join the pieces; at most one empty line in a row."""
        lines: list[str] = []
        for line in "".join(self._pieces).split("\n"):
            line = "\t".join(_tight(line.split("\t"))).rstrip() if line.strip() else ""
            if line or (lines and lines[-1]):
                lines.append(line)
        return "\n".join(lines).strip("\n")


def _tight(cells: list[str]) -> list[str]:
    """Take away the spaces around tabs; what a line begins with stays, as it may be code."""
    last = len(cells) - 1
    cells = [cell.rstrip(" ") if number < last else cell for number, cell in enumerate(cells)]
    return [cell.lstrip(" ") if number else cell for number, cell in enumerate(cells)]
