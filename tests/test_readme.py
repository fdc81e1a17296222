"""The library example of the README runs as it is printed: pasted into a file, on a short text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.readme_example import readme_example
from tests.model_folders import save_model

from longfit.demo import demo_model
from longfit.errors import ModelError

ROOT = Path(__file__).parent.parent
TEXT = "A tile of queries meets the keys before it, and then the next tile does. " * 40


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "example.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("on", ["tiny", pytest.param("demo model", marks=pytest.mark.model)])
def test_the_example_trains_sweeps_and_saves(on: str, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    context, model = 128, tmp_path / "base"
    if on == "tiny":
        save_model(model)  # native context 64: its positions are extended too
    else:
        try:
            model = demo_model()
        except ModelError as error:
            pytest.skip(str(error))
    code = readme_example(
        model=model, text=tmp_path / "book.txt", adapter=tmp_path / "adapter", context=context, group_size=32
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("longfit: ")]
    assert len(told) == 1
    assert "sweeping" in told[0]
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json"} <= {
        entry.name for entry in (tmp_path / "adapter").iterdir()
    }
