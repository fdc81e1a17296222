"""Every causal language model that transformers registers is exact in longfit, or refused by a message that names it.

A third of them in turn, by the day; all of them with ``LONGFIT_FAMILIES=all``, some with their names in its place.
"""

import os
import warnings
from datetime import date
from pathlib import Path

import pytest
from tests.families.exactness import CHECKS, outcome
from tests.families.tiny_family import KINDS, CannotBuild, tiny_family

IN_TURN = ("exact", "packed", "padded")
"""Checked every day; all checks are on request."""


def chosen() -> tuple[list[str], list[str]]:
    """Kinds and checks of this run."""
    asked = os.environ.get("LONGFIT_FAMILIES", "")
    if asked == "all":
        return list(KINDS), list(CHECKS)
    if asked:
        return asked.split(","), list(CHECKS)
    return [kind for number, kind in enumerate(KINDS) if number % 3 == date.today().toordinal() % 3], list(IN_TURN)


@pytest.mark.parametrize("kind", chosen()[0])
def test_a_family_is_exact_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tiny_family(kind)
        except CannotBuild as reason:
            pytest.skip(str(reason))
    found = {}
    for check in chosen()[1]:
        folder = tmp_path / check
        folder.mkdir()
        found[check] = outcome(CHECKS[check], kind, folder)
    wrong = {check: result for check, result in found.items() if result.startswith(("wrong", "crash"))}
    assert not wrong, f"{kind}: {wrong}"
