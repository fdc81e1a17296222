"""Two runs beside each other: what was set differently, whether they read the same, what came out."""

from pathlib import Path

import pytest
from tests.training.conftest import MakeConfig

from longfit.cli.app import main
from longfit.errors import RunError
from longfit.training.loop import train
from longfit.training.run_diff import diff_runs


def test_settings_data_and_results_are_compared(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (tmp_path / name for name in ("first", "second"))
    for run_dir, rank in ((first, 4), (second, 8)):
        train(make_config(train__steps=2, adapter__rank=rank, output__run_dir=str(run_dir)))
    found = diff_runs(first, second)
    assert [(each.name, each.first, each.second) for each in found.settings] == [("adapter.rank", 4, 8)]
    assert found.same_data is True
    results = {each.name: (each.first, each.second) for each in found.results}
    assert results["steps"] == (2, 2)
    assert results["first loss"][0] == results["first loss"][1], "adapters begin at zero, whatever their rank"
    assert results["last loss"][0] != results["last loss"][1]
    (second / "data.json").unlink()
    assert diff_runs(first, second).same_data is None

    capsys.readouterr()
    assert main(["runs", "diff", str(first), str(second)]) == 0
    shown = capsys.readouterr().out
    assert "adapter.rank" in shown
    assert "one of them does not say what it read" in shown
    assert main(["runs", "diff", str(first)]) == 2
    with pytest.raises(RunError, match="nowhere"):
        diff_runs(first, tmp_path / "nowhere")
