"""The page of families says what the survey found, and a third of the types is checked each day."""

from datetime import date
from pathlib import Path

import pytest
from tests.families import test_families
from tests.families.exactness import CHECKS
from tests.families.page import PAGE, families_page, num_exact, num_made
from tests.families.survey import Surveyed, keep_result, read_results, survey_missing
from tests.families.tiny_family import KINDS

README = Path(__file__).parents[2] / "README.md"


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text() == families_page(read_results()), "run python -m tests.families"


def test_every_type_has_a_result_and_none_is_wrong() -> None:
    results = read_results()
    assert results.keys() == set(KINDS)
    assert all(found.made or found.checks.keys() == CHECKS.keys() for found in results.values())
    wrong = {
        kind: name
        for kind, found in results.items()
        for name, what in found.checks.items()
        if what.startswith(("wrong", "crash"))
    }
    assert not wrong


def test_the_readme_says_the_number() -> None:
    results = read_results()
    assert f"{num_exact(results)} of {num_made(results)} model types" in " ".join(README.read_text().split())


def test_three_days_check_every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGFIT_FAMILIES", raising=False)
    days = []
    for ordinal in range(700_000, 700_003):
        today = type("Date", (), {"today": staticmethod(lambda ordinal=ordinal: date.fromordinal(ordinal))})
        monkeypatch.setattr(test_families, "date", today)
        days.append(set(test_families.chosen()[0]))
    assert set.union(*days) == set(KINDS)
    assert sum(map(len, days)) == len(KINDS)
    monkeypatch.setenv("LONGFIT_FAMILIES", "all")
    assert test_families.chosen() == (list(KINDS), list(CHECKS))


def test_a_survey_goes_on_where_it_was_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, found = (
        tmp_path / "results.json",
        Surveyed(made="", layers=(("Layer", 2, "swept"),), checks={"exact": "exact"}),
    )
    monkeypatch.setattr("tests.families.survey.survey", lambda kind: found)
    keep_result("b", found, path)
    assert list(survey_missing(("a", "b"), path=path)) == ["a"]
    assert read_results(path) == {"a": found, "b": found}
    assert list(survey_missing(("b",), again=True, path=path)) == ["b"]
