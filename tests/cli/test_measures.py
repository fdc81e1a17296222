"""One measure of a run or a model, by name."""

import json
from pathlib import Path

import pytest

from longfit.cli.app import main


def test_each_measure_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = str(run.parent / "model"), str(run.parent / "held-out.txt")
    words = ["eval", str(run), "passkey", "--lengths", "300", "--depths", "0,1", "--trials", "2"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(cell["length"], cell["depth"], cell["num_trials"]) for cell in found["cells"]] == [
        (300, 0, 2),
        (300, 1, 2),
    ]
    assert main([*words, "--data", text]) == 0
    assert "(haystack: documents)" in capsys.readouterr().out

    words = ["eval", model, "quant", "--data", text, "--types", "nf4,int8", "--block-sizes", "32,64", "--window", "60"]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["data_type"] and row["data_type"]["name"] for row in rows] == [None, *["nf4"] * 4, *["int8"] * 4]
    assert main(words) == 0
    assert "NF4, blocks of 32, double quantisation" in capsys.readouterr().out

    assert main(["eval", model, "quant", "--data", text, "--budget", "1GB", "--max-tokens", "60"]) == 0
    shown = capsys.readouterr().out
    assert "of its output" in shown
    assert "int8_modules: [" in shown

    words = ["eval", model, "ppl", "--data", text, "--quant", "none", "--window", "60", "--convention", "longlora"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_windows"] == 18
    assert main(words) == 0
    assert "20 tokens are in no window" in capsys.readouterr().err
