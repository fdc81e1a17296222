"""The pages of the experiments say what was measured, and nothing else gets into their places."""

from collections.abc import Mapping

import pytest
from benchmarks.experiments import context_use, data_types, extension_page, qlora_vs_lora, shifted_attention
from benchmarks.experiments.cells import RESULTS, Cells
from benchmarks.experiments.pages import PAGES, fill, rows

PAGE = "# Page\n\nA gain of <!--=gain-->?<!--/-->, again <!--=gain-->?<!--/-->.\n\n<!--=table--><!--/-->\n\nThe end.\n"
TABLE = rows(["type", "bits"], [["NF4", "4.127"]])


def test_numbers_and_tables_are_put_in_place_and_again() -> None:
    found = fill(PAGE, {"gain": "0.1", "table": TABLE})
    assert "A gain of <!--=gain-->0.1<!--/-->, again <!--=gain-->0.1<!--/-->." in found
    assert "<!--=table-->\n| type | bits |\n| --- | --- |\n| NF4 | 4.127 |\n<!--/-->\n\nThe end." in found
    assert fill(found, {"gain": "?", "table": TABLE}) == fill(PAGE, {"gain": "?", "table": TABLE})


@pytest.mark.parametrize(
    ("page", "values", "message"),
    [
        (PAGE, {"gain": "0.1"}, r"places without a value: \['table'\]"),
        (PAGE, {"gain": "0.1", "table": TABLE, "new": "1"}, r"values without a place in the page: \['new'\]"),
        ("A gain of\n<!--=gain-->?<!--/-->.\n", {"gain": "0.1"}, "'gain': begins a line"),
    ],
)
def test_a_page_that_does_not_fit_is_refused(page: str, values: Mapping[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill(page, values)


def test_pages_say_what_was_measured() -> None:
    extension = Cells(RESULTS / "extension.json")
    for page, values in (
        ("data-types.md", data_types.page_values(Cells(RESULTS / "data_types.json"))),
        ("qlora-vs-lora.md", qlora_vs_lora.page_values(Cells(RESULTS / "qlora_vs_lora.json"))),
        ("context-use.md", context_use.page_values(*context_use.newest())),
        ("extension.md", extension_page.page_values(extension)),
        (
            "shifted-attention.md",
            shifted_attention.page_values(Cells(RESULTS / "shifted_attention.json"), extension),
        ),
    ):
        text = (PAGES / page).read_text()
        assert fill(text, values) == text, f"{page}: run its experiment with --draw"
