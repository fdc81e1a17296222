"""What the doctor advises on the allocator of a card, and says of fused kernels."""

import pytest

from longfit.cli.doctor import allocator_advice, inspect_machine


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


def test_it_says_which_fused_kernels_a_card_would_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longfit.model.fused.find_spec", lambda name: None)
    assert inspect_machine()["fused"] == "liger-kernel is not installed: pip install 'longfit[cuda]'"
    monkeypatch.setattr("longfit.model.fused.find_spec", lambda name: name)
    monkeypatch.setattr("longfit.cli.doctor.package_version", lambda name: f"{name} 1.2")
    assert inspect_machine()["fused"] == "liger-kernel liger-kernel 1.2"
