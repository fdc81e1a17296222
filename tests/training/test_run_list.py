"""A list of runs, damaged ones among them."""

import shutil
from pathlib import Path

import pytest

from longfit.cli.app import main
from longfit.config import RunConfig
from longfit.training.run_list import list_runs


def test_a_damaged_run_does_not_hide_the_others(
    run: RunConfig, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, damage_to in (("yaml", "config.yaml"), ("lines", "metrics.jsonl")):
        shutil.copytree(run_dir, tmp_path / name)
        (tmp_path / name / damage_to).write_text("[" * 5000 + "\n")
    found = {summary.run_dir.name: summary for summary in list_runs(tmp_path)}
    assert found["run"].problem is None
    assert found["run"].step == 3
    assert "config.yaml" in str(found["yaml"].problem)
    assert "metrics.jsonl" in str(found["lines"].problem)
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert str(run_dir) in shown.out
    assert "damaged: " in shown.err
    assert str(tmp_path / "yaml" / "config.yaml") in shown.err
    assert str(tmp_path / "yaml") not in shown.out
