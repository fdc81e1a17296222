"""What longfit relies on of Python's own parser of regular expressions."""

import re

import pytest

from longfit.compat.regular_expressions import BRANCH, REPETITIONS, Expression, parsed


def test_repetitions_and_choices_are_found_with_what_is_in_them() -> None:
    code, (least, most, inner) = next(iter(parsed("(?:ab|c)+")))
    assert code in REPETITIONS
    assert (least, most > 1000) == (1, True)
    assert isinstance(inner, Expression)
    assert next(iter(inner))[0] is BRANCH
    assert next(iter(parsed("a*?")))[0] in REPETITIONS
    assert next(iter(parsed("a*+")))[0] in REPETITIONS
    with pytest.raises(re.error):
        parsed("(")
