"""Damaged files of each kind, the same ones every time: ``LONGFIT_FUZZ=300 pytest tests/border``, or 10000."""

import os
from collections.abc import Iterator

import pytest
from tests.border.fuzz import Workshop, fuzz, workshop
from tests.border.materials import Kind, kinds

MUTANTS = int(os.environ.get("LONGFIT_FUZZ", "0"))
pytestmark = pytest.mark.skipif(not MUTANTS, reason="minutes of work: set LONGFIT_FUZZ to a number of mutants")


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
def test_a_damaged_file_is_named_or_changes_nothing(shop: Workshop, kind: Kind) -> None:
    tally = fuzz(shop, kind, count=-(-MUTANTS // len(kinds())))
    assert not tally.wrong, "\n".join(f"{what}: {mutation}\n{said}" for what, mutation, said in tally.wrong[:5])
    assert tally.refused  # else nothing was damaged
