"""``longfit runs``: what lies below a directory, and what differs between two runs."""

import json
from pathlib import Path

import pytest

from longfit.cli.app import main


def test_runs_are_listed_with_their_progress(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(run.parent), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(Path(each["run_dir"]), each["step"], each["finished"]) for each in found] == [(run, 2, True)]
    assert main(["runs", str(run.parent)]) == 0
    assert "2/2" in capsys.readouterr().out
    assert main(["runs", str(run / "adapter")]) == 0
    assert "no runs below" in capsys.readouterr().out


def test_a_run_does_not_differ_from_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "diff", str(run), str(run)]) == 0
    out = capsys.readouterr().out
    assert "the settings are the same" in out
    assert "both read the same data" in out
    for words in (["diff"], ["diff", str(run)]):
        assert main(["runs", *words]) == 2
        assert "longfit runs diff RUN RUN" in capsys.readouterr().err
