"""The Python on the how-to pages runs as it is printed, in a folder with a tiny MODEL and a short book.txt."""

import re
import sys
from pathlib import Path

import pytest
from tests.training.tiny import save_tiny_model

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
PAGES = ("own-loop-trainer-trl.md", "refused-family.md")
BLOCKS = [
    pytest.param(block, id=f"{name}-{number}")
    for name in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", (HOW_TO / name).read_text(), flags=re.M | re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "trl" in block:
        pytest.importorskip("trl", reason="TRL is not installed; run: pip install trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    save_tiny_model(tmp_path / "MODEL")
    (tmp_path / "book.txt").write_text("the long road went on and on, past hills and rivers.\n" * 4)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules[__name__])  # classes of the block must have a module
    exec(compile(block.replace("8192", "64"), "page", "exec"), {"__name__": "page"})
    assert "save_adapter" not in block or (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_pages_have_python() -> None:
    assert len(BLOCKS) == 4
