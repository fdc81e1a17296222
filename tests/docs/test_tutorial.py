"""The tutorial's commands run as they are printed, in order, on a tiny model; only installing is left out."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.training.tiny import save_tiny_model

import longfit

PAGE = Path(__file__).parents[2] / "docs" / "tutorial" / "a-book-on-a-laptop.md"


def test_every_step_runs(tmp_path: Path) -> None:
    script = "\n".join(re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S))
    script = re.sub(r"^(make setup|source .*)$", "", script, flags=re.M)
    script = re.sub(r"^MODEL=.*$", "MODEL=MODEL", script, flags=re.M)
    script = script.replace("'\\n\\n'.join(topics.values())", "topics['while'][:3000]")
    assert script.count("longfit ") == 8
    save_tiny_model(tmp_path / "MODEL")
    small = {"4k": "256", "8k": "512", "[:8000]": "[:60]", "--steps 8": "--steps 2"}
    for printed, tried in small.items():
        assert printed in script
        script = script.replace(printed, tried)
    (tmp_path / "longfit").write_text(f'#!/bin/sh\nexec {sys.executable} -m longfit "$@"\n')
    (tmp_path / "longfit").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(longfit.__file__).parents[1]),
    }
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "merged" / "config.json").is_file()
