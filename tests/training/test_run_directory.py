"""Two runs never mix, a damaged file is found, a run that was cut off anywhere can go on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.border.test_hostile import Touches
from tests.training.conftest import MakeConfig
from tests.training.tiny import read_losses

import longfit
from longfit.cli.app import main
from longfit.config import RunConfig
from longfit.errors import RunError
from longfit.files import checksums
from longfit.files.lock import NAME as LOCK
from longfit.training.checkpoint import damage, list_checkpoints
from longfit.training.loop import train
from longfit.training.metrics import Event
from longfit.training.run_directory import claimed

SOURCES = {**os.environ, "PYTHONPATH": str(Path(longfit.__file__).parent.parent)}


def resumed(config: RunConfig) -> list[str]:
    """Resume; return the warnings."""
    told: list[str] = []
    train(config, resume=True, on_event=lambda event: told.append(event.text) if event.kind == "warning" else None)
    return told


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] ^= 1 << (position % 8)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "file", ["optimizer.pt", "trainable.safetensors", "state.json", "checksums.json", "metrics.jsonl"]
)
def test_a_flipped_bit_in_the_newest_checkpoint_falls_back_to_the_one_before(
    run: RunConfig, run_dir: Path, make_config: MakeConfig, tmp_path: Path, file: str
) -> None:
    unbroken = read_losses(train(make_config(train__save_every=1, output__run_dir=str(tmp_path / "unbroken"))).run_dir)
    flip(run_dir / "checkpoints" / "step-000003" / file, 1000)
    told = resumed(run)
    assert "step-000003 is damaged" in told[0]
    assert "goes on from" in told[0]
    assert "step-000002" in told[0]
    assert read_losses(run_dir) == unbroken
    assert (run_dir / "checkpoints" / "step-000003.damaged").is_dir()
    assert damage(run_dir / "checkpoints" / "step-000003") == []


def test_every_flipped_bit_of_a_checkpoint_is_found(run_dir: Path, run: RunConfig) -> None:
    """A few of them in every file."""
    folder = list_checkpoints(run_dir)[-1]
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 5)):
            flip(path, position)
            assert damage(folder), (path, position)
            path.write_bytes(whole)
        path.unlink()
        assert damage(folder), path
        path.write_bytes(whole)
    assert damage(folder) == []


def test_without_a_sound_checkpoint_the_run_is_refused_and_nothing_is_touched(run: RunConfig, run_dir: Path) -> None:
    for folder in list_checkpoints(run_dir):
        flip(folder / "optimizer.pt", 500)
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(RunError, match=r"no checkpoint is sound\n.*step-000003.*optimizer\.pt(.|\n)*step-000002"):
        resumed(run)
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.parametrize("file", ["config.yaml", "data.json", "ledger.json", "run.json"])
def test_a_changed_file_of_the_run_itself_is_named(run: RunConfig, run_dir: Path, file: str) -> None:
    path = run_dir / file
    text = path.read_text()
    for old, new in (("seed: 0", "seed: 1"), ('": "', '": "0'), ("0", "1")):
        if old in text:
            path.write_text(text.replace(old, new, 1))
            with pytest.raises(RunError, match=file):
                resumed(run)
    path.unlink()
    with pytest.raises(RunError, match=file):
        resumed(run)


def test_settings_of_a_run_that_lack_something_are_named(
    run_dir: Path, run: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "config.yaml").write_text("")
    assert main(["train", "--run-dir", str(run_dir), "--resume"]) == 2
    assert f"{run_dir / 'config.yaml'}: 2 settings are wrong" in capfd.readouterr().err.replace("\n", " ")


def test_metrics_that_were_deleted_are_noticed_and_come_back(run: RunConfig, run_dir: Path) -> None:
    before = read_losses(run_dir)
    (run_dir / "metrics.jsonl").unlink()
    assert "metrics.jsonl: was removed or changed" in resumed(run)[0]
    assert read_losses(run_dir)[:3] == before


# ------------------------------------------------------------------------------------------------ one process at a time
def test_two_processes_do_not_share_a_directory(make_config: MakeConfig, run: RunConfig, run_dir: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from longfit.files.lock import FolderLock
lock = FolderLock(Path({str(run_dir)!r})).take()
print("held", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=SOURCES
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    for resume in (True, False):
        with pytest.raises(RunError, match=f"is being written by process {holder.pid}"):
            train(run, resume=resume)
    holder.kill()
    holder.communicate()
    assert (run_dir / LOCK).exists()  # a file that nobody locks means nothing
    assert not [line for line in resumed(run) if str(run_dir) in line]
    assert not (run_dir / LOCK).exists()


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_stands_in_the_place_of_the_lock_is_neither_waited_for_nor_written(
    run: RunConfig, run_dir: Path, tmp_path: Path, kind: str
) -> None:
    (victim := tmp_path / "victim").write_text("precious")
    {"pipe": os.mkfifo, "link": lambda path: path.symlink_to(victim), "folder": Path.mkdir}[kind](run_dir / LOCK)
    with pytest.raises(RunError, match=rf"{run_dir / LOCK}: is no regular file; remove it"):
        train(run, resume=True)
    assert victim.read_text() == "precious"


def test_code_in_an_optimiser_state_is_not_executed(run: RunConfig, run_dir: Path, tmp_path: Path) -> None:
    """By somebody who makes the checksums anew."""
    newest = list_checkpoints(run_dir)[-1]
    torch.save({"state": Touches(tmp_path / "flag")}, newest / "optimizer.pt")
    checksums.seal_folder(newest)
    with pytest.raises(RunError, match=r"optimizer\.pt: holds something else than tensors"):
        train(run, resume=True)
    assert not (tmp_path / "flag").exists()


def test_two_that_choose_a_name_at_once_get_two_names(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config(output__run_dir=None)
    with (
        claimed(config, resume=False, on_event=print) as first,
        claimed(config, resume=False, on_event=print) as second,
    ):
        assert (first.name, second.name) == ("model-001", "model-002")
        (first / "something").touch()
    assert list(Path("runs").iterdir()) == [first]  # an empty one goes


def test_a_file_where_a_folder_should_be_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=str(place)):
            train(make_config(output__run_dir=str(place)))


# ------------------------------------------------------------------------------------------------ cut off anywhere
def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(
    run: RunConfig, run_dir: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    unbroken = read_losses(train(make_config(train__save_every=1, output__run_dir=str(tmp_path / "unbroken"))).run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    assert "nothing was saved yet; the run starts from the beginning" in resumed(run)[0]
    assert read_losses(run_dir) == unbroken


def test_a_start_that_was_cut_off_is_begun_again(run: RunConfig, run_dir: Path) -> None:
    for path in run_dir.iterdir():
        if path.name not in ("ledger.json", "data.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run_dir / ".config.yaml.unfinished").write_text("model:")
    with pytest.raises(RunError, match="its start was cut off; longfit train starts it again"):
        resumed(run)
    assert train(run).finished
    assert not list(run_dir.glob(".*"))


def test_leftovers_are_swept(run: RunConfig, run_dir: Path) -> None:
    for name in (".step-000001.removed", ".step-000004.unfinished"):
        (run_dir / "checkpoints" / name / "adapter").mkdir(parents=True)
    (run_dir / ".plan.json.unfinished").touch()
    resumed(run)
    assert not [path for path in run_dir.rglob(".*") if path.name.endswith((".removed", ".unfinished"))]


def test_a_folder_that_is_removed_in_mid_run_is_named_and_not_made_again(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    def remove(event: Event) -> None:
        if event.kind == "step" and event.values["step"] == 2:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: its folder is gone.* start the run again"):
        train(make_config(), on_event=remove)
    assert not (tmp_path / "run").exists()


def test_a_watcher_that_has_gone_does_not_stop_the_run(make_config: MakeConfig) -> None:
    def gone(event: Event) -> None:
        if event.kind == "step":
            raise OSError(5, "Input/output error")  # what a closed terminal says

    assert train(make_config(), on_event=gone).finished


def test_a_disk_too_small_for_the_checkpoints_shows_before_the_first_step(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a memory plan, and by the same numbers."""

    def usage(path: Any) -> Any:
        return real(path)._replace(free=40 << 20)

    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(Exception, match=r"disk: needs .* has 40[.]0 MiB"):
        train(make_config())
    with pytest.raises(RunError, match=r"will write .* the disk has 40[.]0 MiB free"):
        train(make_config(engine__engine="plain"))
    assert not (tmp_path / "run").exists()
