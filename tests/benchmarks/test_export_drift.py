"""The pages say of the drift what was measured."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import export_drift


@pytest.mark.parametrize("page", export_drift.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_table_of_the_measurements(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert export_drift.filled(text, export_drift.read_rows()) == text, "python benchmarks/export_drift.py fills it"


def test_every_way_out_has_its_row() -> None:
    names = " ".join(row.name for row in export_drift.read_rows())
    assert all(way in names for way in ("onto 16bit", "onto 4bit", "F16", "Q8_0", "Q4_0", "GGUF adapter"))
