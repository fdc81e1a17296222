"""``longfit eval``: the report of a run, each measure alone, and what is refused."""

import json
from pathlib import Path

import pytest

from longfit.cli.app import main


def test_a_run_directory_is_enough_for_its_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--no-passkey"]) == 0
    out = capsys.readouterr().out
    assert "tokens" in out
    assert f"Report: {run / 'report.html'}" in out
    page = (run / "report.html").read_text()
    assert f"longfit eval {run} --no-passkey" in page
    assert main(["eval", str(run), "--no-passkey", "--window", "200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["window"], found["context"]) == (200, 512)
    assert found["states"][2]["name"] == "tuned"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL"], "not a run; say what to measure of a base model: ppl, passkey, quant"),
        (["RUN", "speed"], "one of report, ppl, passkey, quant"),
        (["RUN", "ppl"], "no text given"),
        (["RUN", "quant"], "quantised already; give its base model"),
        (["MODEL", "quant", "--types", "nf5"], "allowed are int8, int8_rows, int4, fp4, mxfp4, nvfp4, nf4, quantile"),
        (["MODEL", "passkey", "--depths", "begin"], "--depths begin: must be numbers"),
        (["MODEL", "passkey", "--lengths", "4k,many"], "--lengths many"),
        (["MODEL", "passkey", "--lengths", "20"], "length 20: the shortest prompt"),
        (["RUN", "--window", "5k"], "no document long enough"),
        (["RUN", "--effort", "-1"], "effort -1"),
    ],
)
def test_errors(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"RUN": str(run), "MODEL": str(run.parent / "model")}
    assert main(["eval", *(places.get(word, word) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
