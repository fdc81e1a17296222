"""The card's own lines load base and adapter in plain transformers and peft, from elsewhere, for both kinds of base."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tests.exporting.adapted import gpt2_rule, save_adapted
from tests.training.conftest import MakeConfig

from longfit.exporting.export import export
from longfit.training import model_card
from longfit.training.loop import train
from longfit.training.prepare import open_run
from longfit.training.run_directory import read_config

IDS = torch.arange(5, 25)[None]
TAIL = """
import sys, torch
with torch.no_grad():
    torch.save(model.float().eval()(input_ids=torch.load(sys.argv[1])).logits, sys.argv[2])
assert not any(name.split(".")[0] == "longfit" for name in sys.modules)
"""


def gguf_base(tmp_path: Path) -> Path:
    """A GGUF file as a base: an export of ours."""
    save_adapted(tmp_path, "mistral", tokenizer=gpt2_rule())
    result = export(tmp_path / "adapter", tmp_path / "file", type="F16", onto="16bit", measure=False)
    return tmp_path / "file" / result.files[0]


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_the_lines_of_the_card_work_from_another_folder(kind: str, make_config: MakeConfig, tmp_path: Path) -> None:
    settings = {"train__steps": 2, "train__learning_rate": 0.02, "context__context": 96}
    if kind == "gguf":
        settings |= {"model__name": str(gguf_base(tmp_path)), "context__context": 256}
    run = train(make_config(**settings)).run_dir
    card = (run / "adapter" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    torch.save(IDS, tmp_path / "ids.pt")
    (tmp_path / "elsewhere").mkdir()
    arguments = [sys.executable, "-c", code + TAIL, str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    model, _, _ = open_run(run)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with model.disable_adapter():
            untrained = model(input_ids=IDS).logits
    # Both in float32: sums of 96 terms in another order, 20 of them one after the other.
    bound = 96 * 20 * 2.0**-24 * expected.abs().max()
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() <= bound < (untrained - expected).abs().max()


def test_a_gguf_base_is_named_with_its_hash(make_config: MakeConfig, tmp_path: Path) -> None:
    path = gguf_base(tmp_path)
    run = train(make_config(model__name=str(path), train__steps=1)).run_dir
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads((run / "adapter" / "config.json").read_text())["gguf_base"] == {
        "file": path.name, "sha256": digest
    }  # fmt: skip
    card = (run / "adapter" / "README.md").read_text()
    assert f"sha256 `{digest}`" in card


def test_a_card_that_cannot_be_written_leaves_the_adapter_as_it_was(make_config: MakeConfig, monkeypatch) -> None:
    run = train(make_config(train__steps=1)).run_dir
    before = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    monkeypatch.setattr(model_card, "model_card", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        model_card.write_cards(run, read_config(run))
    assert {path.name: path.read_bytes() for path in (run / "adapter").iterdir()} == before
    assert not list(run.glob(".*unfinished"))


def test_the_card_says_what_was_done(make_config: MakeConfig) -> None:
    events = []
    config = make_config(data__validation_fraction=0.2, adapter__train_norms=True, train__steps=2, train__eval_every=1)
    run = train(config, on_event=events.append).run_dir
    card = (run / "best" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == config.model.name
    assert head["license"] is None
    assert "lowest validation loss" in card
    assert "this adapter is that of that step" in card
    assert (
        f"Merge it with longfit merge {run} --out DIR" in card or f"merge it with longfit merge {run} --out DIR" in card
    )
    assert re.search(r"- training: \d+ sources, sha256 of their digests `[0-9a-f]{64}`", card)
    assert "train_norms: true" in card
    assert any("norms trained whole, which servers of plain LoRA" in e.text for e in events if e.kind == "warning")
