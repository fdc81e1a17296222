"""Numbers of the pages under docs/explanation: written from what was measured, never by hand.

A page is prose with places in it, each between two comments that no renderer shows:

    NF4 leads by <!--=lead-->0.072<!--/--> nats.            a number within a sentence

    <!--=table-->                                            a table, on lines of its own
    | type | bits |
    <!--/-->

An experiment fills all places of its page when it ends, and again with --draw; a test compares the pages with the
results. A place that the experiment does not know, or one that the page lost, is an error.
"""

import re
from collections.abc import Mapping, Sequence

from benchmarks.experiments.cells import ROOT

PAGES = ROOT / "docs" / "explanation"
PLACE = re.compile(r"<!--=(?P<name>[^>]+)-->.*?<!--/-->", re.DOTALL)
FIRST = re.compile(r"^[ \t]*<!--=(?P<name>[^>]+)-->", re.MULTILINE)


def fill(text: str, values: Mapping[str, str]) -> str:
    """A page with these values in its places; one value may stand in several places.

    Raises: ValueError: places and values do not fit each other; or a number begins a line.
    """
    names = {found["name"] for found in PLACE.finditer(text)}
    if names != set(values):
        lost, empty = sorted(set(values) - names), sorted(names - set(values))
        raise ValueError(f"values without a place in the page: {lost}; places without a value: {empty}")

    first = next((found["name"] for found in FIRST.finditer(text) if not values[found["name"]].startswith("|")), None)
    if first is not None:
        raise ValueError(f"place {first!r}: begins a line, so Markdown ends the paragraph there; put a word before it")

    def written(found: re.Match[str]) -> str:
        value = values[found["name"]]
        around = "\n" if value.startswith("|") else ""
        return f"<!--={found['name']}-->{around}{value}{around}<!--/-->"

    return PLACE.sub(written, text)


def write(page: str, values: Mapping[str, str]) -> None:
    """Fill the places of a page under docs/explanation."""
    path = PAGES / page
    path.write_text(fill(path.read_text(), values))


def rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    assert all(len(line) == len(head) for line in lines), lines
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
