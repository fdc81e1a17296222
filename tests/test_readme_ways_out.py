"""The lines of the README that hand a run on and train on, each run as it stands there, and used by whom they name."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.exporting.adapted import gpt2_rule
from tests.exporting.conftest import make_run  # noqa: F401
from tests.exporting.llama_cpp import LlamaCpp, distance, rounding_bound
from tests.training.tiny import read_losses

from longfit.cli.app import main
from longfit.training.prepare import open_run

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCK = README.split("## Hand it on, train on")[1].split("```")[1]
LINES = {purpose: line for line in BLOCK.strip().splitlines() for purpose in [line.split("# ")[1].split(":")[0]]}
TEXT = "the year 1984 was hot, said Zoë"


@pytest.fixture(scope="module")
def place(make_run, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder in which the README's names exist: runs/x, MODEL, new.txt."""
    run = make_run(model__vocab_size=340, tokenizer=gpt2_rule(), context__context=64, adapter__rank=16)
    place = tmp_path_factory.mktemp("place")
    (place / "runs").mkdir()
    shutil.copytree(run, place / "runs" / "x")
    (place / "MODEL").symlink_to(run.parent / "model")
    (place / "new.txt").write_text("a town where nobody slept went over the hills. " * 40)
    return place


def run_line(purpose: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run a line of the block; returns the words of the command that its remark gives."""
    monkeypatch.chdir(place)
    command, _, remark = LINES[purpose].partition("#")
    assert main(shlex.split(command)[1:]) == 0
    return shlex.split(remark.partition(":")[2])


def test_all_of_the_block_is_tested() -> None:
    assert list(LINES) == ["to vLLM or transformers", "to llama.cpp", "to Ollama", "go on training, on new data"]


def test_to_vllm_or_transformers(place: Path, monkeypatch) -> None:
    folder = run_line("to vLLM or transformers", place, monkeypatch)[-1]
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\nimport sys, torch\n"
        f"model, tokenizer = (kind.from_pretrained({folder!r}) for kind in (AutoModelForCausalLM, AutoTokenizer))\n"
        f"torch.save(model(**tokenizer({TEXT!r}, return_tensors='pt')).logits.detach(), 'logits.pt')\n"
        "assert not {'longfit', 'peft'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    model, tokenizer, _ = open_run(place / "runs" / "x")
    with torch.no_grad():
        expected = model(**tokenizer(TEXT, return_tensors="pt")).logits
    # Float32: sums of 128 terms in another order, about twenty of them one after the other.
    found = torch.load(place / "logits.pt")
    assert (found - expected).abs().max() <= 128 * 20 * 2.0**-24 * expected.abs().max()


def test_to_llama_cpp(place: Path, monkeypatch) -> None:
    path = run_line("to llama.cpp", place, monkeypatch)[-1]
    theirs = LlamaCpp(place / path, context=64)
    model, tokenizer, _ = open_run(place / "runs" / "x")
    ids = tokenizer(TEXT).input_ids
    assert theirs.tokenize(TEXT) == ids
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    # In Q8_0 weights are rounded like the inputs that llama.cpp multiplies them with: the two add in quadrature.
    assert distance(theirs.logits(ids), expected) < 2**0.5 * rounding_bound("Q8_0", 2)
    theirs.close()


def test_to_ollama(place: Path, monkeypatch) -> None:
    path = Path(run_line("to Ollama", place, monkeypatch)[-1])
    text = (place / path).read_text()
    (model,) = re.findall(r"^FROM \./(.+)$", text, flags=re.M)
    assert (place / path.parent / model).read_bytes()[:4] == b"GGUF"
    assert "PARAMETER num_ctx 64\n" in text


def test_go_on_training(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(LINES, "go on", LINES["go on training, on new data"])
    run_line("go on", place, monkeypatch)
    (new,) = [path for path in (place / "runs").iterdir() if path.name != "x"]
    assert len(read_losses(new)) > 0
    assert json.loads((new / "adapter" / "adapter_config.json").read_text())["r"] == 16
    assert "starting from runs/x" in capsys.readouterr().err.replace(f"{place}/", "")
