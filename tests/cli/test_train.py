"""`longfit train`: mistakes are told before anything is written, and nothing is overwritten."""

import json
from pathlib import Path

import pytest

from longfit.cli import train
from longfit.cli.app import main


@pytest.fixture
def train_words(workplace: Path, tmp_path: Path) -> list[str]:
    """A command that works, to be spoiled."""
    run = str(tmp_path / "run")
    words = ["train", str(workplace / "model"), str(workplace / "texts"), "--run-dir", run, "--context", "96"]
    return [*words, "--steps", "2", "--quant", "none", "model.dtype=float32"]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that the user must correct; return what it told."""
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert any(line.startswith("error: ") for line in told.splitlines())
    return told


def test_wrong_data_is_refused_before_anything_is_written(
    train_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"text\x00\x01\x02")
    cases = {
        str(tmp_path / "emtpy"): "did you mean",
        str(tmp_path / "empty"): "the folder is empty",
        str(tmp_path / "binary.txt"): "binary, not text: NUL byte at offset 4",
    }
    for path, expected in cases.items():
        told = refused([*train_words[:2], path, *train_words[3:]], capsys)
        assert path.rpartition("/")[2] in told
        assert expected in told
    told = refused(["train", str(tmp_path / "nomodel"), *train_words[2:]], capsys)
    assert "nomodel" in told
    assert not (tmp_path / "run").exists()


def test_wrong_settings_are_refused_all_at_once(
    train_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused([*train_words, "--attention", "shifted", "--group-size", "17", "train.learning_rte=1"], capsys)
    assert "--group-size 17: must be an even number of tokens, at least 2; try --group-size 18" in told
    assert "unknown key train.learning_rte; did you mean train.learning_rate?" in told
    assert "one word too many" in refused([*train_words, "third"], capsys)
    assert "which run?" in refused(["train", "--resume"], capsys)
    assert "no base model given" in refused(["train"], capsys)
    assert not (tmp_path / "run").exists()


def test_devices_that_cannot_be_divided_so_are_refused_before_processes_are_started(
    train_words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "start_processes", lambda *_, **__: pytest.fail("processes were started"))
    told = refused([*train_words, "--devices", "3", "--sequence", "2"], capsys)
    assert "parallel.sequence=2 does not divide 3 devices; try 1 or 3" in told
    told = refused([*train_words, "--devices", "4", "--shard", "3"], capsys)
    assert "parallel.shard=3 does not divide 4 devices; try 2 or 4" in told


def test_a_run_from_the_command_line(
    train_words: list[str], workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train_words[:-1], "model.dtype=float32", "--context", "400"]) == 0
    out, err = capsys.readouterr()
    assert "warning: context 400 is longer than any document" in err
    assert "step 2/2  loss" in err
    assert f"longfit eval {tmp_path / 'run'} ppl" in out  # the last lines name what can be done next

    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "--resume continues it; or choose another --run-dir" in refused(train_words, capsys)
    changed = ["train", "--run-dir", str(tmp_path / "run"), "--resume", "train.seed=5"]
    assert "train.seed: the run has 0, now 5" in refused(changed, capsys)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    assert main(["train", "--run-dir", str(tmp_path / "run"), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] is True
    text = str(workplace / "texts" / "text0.txt")
    measured = []
    for target in (str(tmp_path / "run"), str(workplace / "model")):
        assert main(["eval", target, "ppl", "--data", text, "--window", "60", "--quant", "none", "--json"]) == 0
        measured.append(json.loads(capsys.readouterr().out))
    assert measured[0]["num_tokens"] == measured[1]["num_tokens"]
    assert measured[0]["perplexity"] != measured[1]["perplexity"]  # the run's adapter acts
    assert main(["eval", str(tmp_path / "run"), "ppl", "--data", text, "--max-tokens", "20"]) == 0
    assert "over 19 tokens (convention document, window 400" in capsys.readouterr().out  # the context of the run
    told = refused(["eval", "m", "ppl", "--data", text, "--window", "x"], capsys)
    assert "--window x: must be a number of tokens" in told
    assert "one of report, ppl, passkey, quant" in refused(["eval", "m", "speed"], capsys)

    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert [run["step"] for run in json.loads(capsys.readouterr().out)] == [2]
    assert main(["runs", str(tmp_path)]) == 0
    assert "2/2" in capsys.readouterr().out


def test_a_config_file_and_where_settings_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("adapter:\n  rank: 8\ntrain:\n  seed: 3\n")
    assert main(["train", "base", "texts", str(file), "train.seed=4", "--context", "16k", "--explain", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["adapter.rank"]["value"], rows["adapter.rank"]["origin"]) == (8, f"{file}:2")
    assert (rows["train.seed"]["value"], rows["train.seed"]["origin"]) == (4, "override")
    assert (rows["context.context"]["value"], rows["context.context"]["origin"]) == (16384, "--context")
    assert main(["train", "base", "texts", str(file), "--explain"]) == 0
    assert f"{file}:4" in capsys.readouterr().out


def test_an_option_that_is_called_otherwise_now_is_named(
    train_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--arena is called --offload now" in refused([*train_words, "--arena=file"], capsys)


def test_short_help_and_a_dry_run(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("train", "data", "eval", "chat", "explain"):
        assert main([verb, "-h"]) == 0
        assert "Usage" in capsys.readouterr().out
    words = ["train", str(workplace / "model"), str(workplace / "texts"), "--context", "96", "--steps", "3"]
    words += ["--quant", "none", "--dtype", "float32", "--run-dir", str(tmp_path / "run"), "--dry-run"]
    assert main(words) == 0
    assert "dry run: 3 steps on" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
