"""What the doctor advises on the allocator of a card, and which backend it says each operation has."""

import json
from pathlib import Path

import pytest
from tests.model_folders import byte_tokenizer, llama

from longfit.cli.app import main
from longfit.cli.doctor import allocator_advice, inspect_machine
from longfit.kernels.dispatch import CALLS, TABLE, use_backend


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


def test_every_operation_is_told_for_every_dtype_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longfit.kernels.elementwise.find_spec", lambda name: None)
    rows = inspect_machine()["kernels"]
    assert {row["op"] for row in rows} == TABLE.keys()
    assert all(row["reason"] and row["backend"] in TABLE[row["op"]] for row in rows)
    for op in CALLS:
        told = sorted(dtype for row in rows if row["op"] == op and row["device"] == "cpu" for dtype in row["dtypes"])
        assert told == ["bfloat16", "float16", "float32"]
    rotary = next(row for row in rows if row["op"] == "rotary")
    assert "not liger: liger-kernel is not installed: pip install 'longfit[cuda]'" in rotary["reason"]
    with use_backend("reference"):
        forced = inspect_machine()["kernels"]
    assert {(row["backend"], row["reason"]) for row in forced} == {("reference", "forced by use_backend")}


def test_a_model_is_understood_instead_of_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "family     llama: LlamaForCausalLM, decoder LlamaModel" in text
    assert "quantised  14 of 14 linear layers" in text
    assert "documents share windows" in text
    assert "chat       keys and values in storage with room" in text
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reads"] == "roomy"


def test_doctor_tells_what_runs_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"]
    kernels = {(row["op"], row["device"]): row for row in facts["kernels"]}
    assert kernels["linear_4bit", "cpu"]["backend"] in ("cpu", "reference")
    assert facts["memory"]["available_bytes"] > 0
    assert main(["doctor"]) == 0
    assert "linear_4bit" in capsys.readouterr().out
