"""What the doctor advises on the allocator of a card."""

import pytest

from longfit.cli.doctor import allocator_advice


@pytest.mark.parametrize("settings", ["expandable_segments:True", "backend:native, expandable_segments: true"])
def test_no_advice_where_segments_grow_already(settings: str) -> None:
    assert allocator_advice(settings) is None


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (None, "export PYTORCH_ALLOC_CONF=expandable_segments:True "),
        ("", "export PYTORCH_ALLOC_CONF=expandable_segments:True "),
        ("backend:native", "export PYTORCH_ALLOC_CONF=backend:native,expandable_segments:True "),
    ],
)
def test_advice_keeps_what_is_set(settings: str | None, line: str) -> None:
    assert (allocator_advice(settings) or "").startswith(line)
