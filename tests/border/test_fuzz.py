"""Damaged files of each kind, the same ones every time; ``LONGFIT_FUZZ=10000 pytest tests/border`` makes more of them.

One test for all kinds, as the sound files and the warm process cost more than the mutants.
"""

import os
import sys

import pytest
from tests.border.fuzz import fuzz, workshop
from tests.border.materials import kinds

MUTANTS = int(os.environ.get("LONGFIT_FUZZ", "250"))


@pytest.mark.skipif(sys.platform != "linux", reason="mutants are read in forks, with limits that Linux has")
def test_a_damaged_file_is_named_or_changes_nothing() -> None:
    wrong, refused = [], 0
    with workshop() as shop:
        for kind in kinds():
            tally = fuzz(shop, kind, count=-(-MUTANTS // len(kinds())))
            wrong += [f"{kind.name}: {what}: {mutation}\n{said}" for what, mutation, said in tally.wrong]
            refused += tally.refused
    assert not wrong, "\n".join(wrong[:5])
    assert refused > MUTANTS // 2, f"{refused} of {MUTANTS}: little was damaged"
