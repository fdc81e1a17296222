"""How Python itself reads a regular expression; there is no public way to ask how an expression repeats.

The parser is a private module of ``re`` since Python 3.11; ``sre_parse``, its public name of before, is deprecated.
"""

from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

BRANCH = codes.BRANCH
REPETITIONS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)
"""Each with arguments (least, most, expression)."""
Expression: Any = parser.SubPattern
"""A sequence of (code, arguments); arguments may hold expressions."""


def parsed(pattern: str) -> Any:
    """Parse an expression. Raises: re.error, RecursionError, OverflowError: it is none."""
    return parser.parse(pattern)
