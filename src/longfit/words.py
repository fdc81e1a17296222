"""How things are shown to people, one way everywhere: bytes in words, a curve as a line of bars, texts from outside."""

import math
import re
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"


_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but line ends and tabs, marks that turn the direction of text, halves of characters."""


def visible(text: str) -> str:
    """Write out what a terminal would obey, or could not show: a file's name may hold anything but a slash."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


def format_bytes(num_bytes: float) -> str:
    """Say a size in the unit that shows it: ``4.78 GiB``, ``53.2 MiB``; what is there is never said to be 0."""
    if abs(num_bytes) >= 0.1 * 2**30:
        return f"{num_bytes / 2**30:,.2f} GiB"
    size = num_bytes / 2**20
    return "below 0.1 MiB" if 0 < abs(size) < 0.1 else f"{size:.1f} MiB"


def sparkline(values: Sequence[float], *, width: int = 24) -> str:
    """Draw values as a line of small bars, the largest full; more than ``width`` are averaged in groups.

    Args:
        values: in order; what is not finite is left out.
        width: bars at most.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    size = -(-len(finite) // width)
    bars = [sum(finite[at : at + size]) / len(finite[at : at + size]) for at in range(0, len(finite), size)]
    low, high = min(bars), max(bars)
    steps = len(_BARS) - 1
    return "".join(_BARS[round((bar - low) / (high - low) * steps) if high > low else steps // 2] for bar in bars)
