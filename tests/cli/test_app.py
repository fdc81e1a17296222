"""The command line: instant help, errors without a traceback, and nothing overwritten."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import longfit
from longfit.cli import doctor
from longfit.cli.app import main
from longfit.errors import BackendError

SOURCES = str(Path(longfit.__file__).parent.parent)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "m", "d", "--explain"]])
def test_help_imports_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from longfit.cli.app import main; code = main(sys.argv[1:]);"
        "print(sorted({'torch', 'transformers', 'peft', 'accelerate'} & set(sys.modules))); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": SOURCES},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_our_own_faults_end_with_1_and_a_traceback_only_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> None:
        def broken() -> None:
            raise error

        monkeypatch.setattr(doctor, "inspect_machine", broken)

    fail(ZeroDivisionError("[bold] is not markup"))
    assert main(["doctor"]) == 1
    told = capsys.readouterr().err
    assert "error: ZeroDivisionError: [bold] is not markup" in told
    assert "bug in longfit" in told
    with pytest.raises(ZeroDivisionError):
        main(["doctor", "--debug"])
    fail(BackendError("no kernel"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "error: no kernel\n"
    assert main(["doctr"]) == 2
    assert "doctor" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_the_shell_closed_is_no_fault(closed: str, tmp_path: Path) -> None:
    command = f'{sys.executable} -m longfit runs "{tmp_path}" {closed}'
    done = subprocess.run(command, shell=True, env={**os.environ, "PYTHONPATH": SOURCES}, check=False)
    assert done.returncode == 0


def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "model", "t\udcff.txt"]) == 2
    assert "t\\udcff.txt: not UTF-8" in capsys.readouterr().err
