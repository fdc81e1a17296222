"""What a terminal sees and how a command ends: no text from outside is obeyed, a failure has its code and place."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import longfit
from longfit.cli import app as app_module
from longfit.cli.app import main
from longfit.notice import notify

SOURCES = str(Path(longfit.__file__).parent.parent)


def test_a_failure_is_json_where_results_are(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", str(tmp_path / "no\x1b.txt"), "--model", "x", "--json"]) == 2
    out, err = capfd.readouterr()
    error = json.loads(out)["error"]
    assert (error["kind"], error["exit_code"]) == ("DataError", 2)
    assert "does not exist" in error["message"]
    assert "does not exist" in err
    assert "\x1b" not in out + err
    assert main(["data", "--json"]) == 2
    assert json.loads(capfd.readouterr().out)["error"]["kind"] == "UsageError"


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/plan.json"), 2, "/x/plan.json: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "/x: this place may not be written"),
        (MemoryError(), 2, "not enough memory"),
        (OSError(errno.ENOENT, "No such file", "/x"), 1, "bug in longfit"),
        (KeyError("x"), 1, "bug in longfit"),
        (SystemError("x"), 1, "bug in longfit"),
    ],
)
def test_who_is_at_fault(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], raised: Exception, code: int, said: str
) -> None:
    def fail(**words: object) -> None:
        raise raised

    monkeypatch.setattr(app_module, "app", fail)
    assert main(["runs"]) == code
    assert said in capfd.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_that_is_full_is_told() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "longfit", "explain", "rank", "--json"],
            stdout=full, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": SOURCES},
        )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"error: output: the disk is full")


def test_a_terminal_of_another_encoding_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["runs", str(tmp_path / "größe")]) == 0
    shown.flush()
    assert rb"gr\xf6\xdfe" in shown.buffer.getvalue()  # type: ignore[attr-defined]


def test_one_process_speaks_for_all(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    notify("hello")
    app_module._show_warning("hello")
    assert capfd.readouterr().err == ""
