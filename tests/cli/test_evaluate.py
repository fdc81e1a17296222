"""``longfit eval``: the report of a run, each measure alone, and what is refused."""

import json
from pathlib import Path

import pytest
from tests.evaluation.finished_run import make_run

from longfit.cli.app import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("evaluate"))


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
