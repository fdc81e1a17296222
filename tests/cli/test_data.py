"""`longfit data`: every token has its account, and the next command can be pasted."""

import json
import shlex
from pathlib import Path

import pytest

from longfit.cli.app import main


def test_data_accounts_for_every_token(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", str(workplace / "texts"), "--model", str(workplace / "model"), "--context", "100"]
    assert main([*words, "--json"]) == 0
    ledger = json.loads(capsys.readouterr().out)
    kinds = ("trained", "masked", "start", "boundary", "cut", "dropped")
    assert sum(ledger[f"{kind}_tokens"] for kind in kinds) == ledger["total_tokens"]
    assert main([*words, "--sample"]) == 0
    out = capsys.readouterr().out
    assert f"{ledger['total_tokens']:,} tokens" in out
    assert "[[" in out
    assert "longfit train" in out.splitlines()[-1]


def test_the_next_command_of_data_can_be_pasted(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "a text.txt"
    text.write_text("a road, and a road. " * 20)
    words = [str(text), "--model", str(workplace / "model"), "--context", "64", 'data.exclude=["*.log"]']
    assert main(["data", *words]) == 0
    pasted = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert pasted[:2] == ["longfit", "train"]
    assert main([*pasted[1:], "train.steps=1", "model.quant=none", "--dry-run"]) == 0
