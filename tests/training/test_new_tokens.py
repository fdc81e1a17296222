"""A run that trains the rows of new tokens alone: resumed bit for bit, read again, started from, merged, carded."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import MakeConfig
from tests.training.tiny import read_losses, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from longfit.errors import ConfigError, ModelError
from longfit.exporting.merge import merge
from longfit.training.loop import train
from longfit.training.prepare import open_run

IDS = torch.tensor([[33, 5, 9, 34, 12, 33, 7]])


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path: Path) -> Path:
    """The tiny model of 33 rows, with a tokenizer of 35 tokens."""
    folder = save_tiny_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    if request.param:
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<q>", "<a>"])
    tokenizer.save_pretrained(folder)
    (tmp_path / "talk.txt").write_text("<q>who went on<a>the road. <q>past what<a>hills and rivers. " * 8)
    return folder


@pytest.fixture
def config(base: Path, make_config: MakeConfig, tmp_path: Path):
    return make_config(
        model__name=str(base), data__path=str(tmp_path / "talk.txt"), adapter__train_new_tokens=True,
        train__learning_rate=0.02, train__save_every=2,
    )  # fmt: skip


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Float32: sums of 64 terms in another order, about twenty of them one after the other."""
    assert (found - expected).abs().max() <= 64 * 20 * 2.0**-24 * expected.abs().max()


def test_the_rows_train_and_are_merged_and_loaded_by_the_card(base: Path, config, tmp_path: Path) -> None:
    events = []
    run = train(config, on_event=events.append).run_dir
    assert any("2 new tokens get a row, from 33 on" in event.text for event in events)
    assert any("embeddings of new tokens trained whole" in event.text for event in events if event.kind == "warning")
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    rows = {name: tensor for name, tensor in saved.items() if "lora_" not in name}
    mean = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight.mean(0)
    assert {tuple(tensor.shape) for tensor in rows.values()} == {(2, 48)}
    assert all((tensor - mean).abs().max() > 0.01 for name, tensor in rows.items() if "embed" in name)
    model, tokenizer, _ = open_run(run)
    assert tokenizer("<q>a").input_ids == [33, 3]
    expected = logits(model)
    merge(run, tmp_path / "merged", measure=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config.vocab_size == 35
    assert "base_vocab_size" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert_same(logits(plain), expected)
    (code,) = re.findall(r"```python\n(.*?)```", (run / "adapter" / "README.md").read_text(), flags=re.S)
    torch.save(IDS, tmp_path / "ids.pt")
    code += f"\nimport torch\nids = torch.load({str(tmp_path / 'ids.pt')!r})\n"
    code += f"torch.save(model.eval()(input_ids=ids).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(torch.load(tmp_path / "logits.pt"), expected)


def test_a_resumed_run_is_the_unbroken_one(config) -> None:
    run = train(config).run_dir
    whole, adapter = read_losses(run), load_file(run / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    train(config, resume=True)
    assert read_losses(run) == whole
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)


def test_another_run_starts_from_the_rows(config, tmp_path: Path) -> None:
    old = train(config).run_dir
    model, _, _ = open_run(old)
    warm = config.replace({"adapter.init": str(old), "output.run_dir": str(tmp_path / "warm"), "train.steps": 1})
    warm = warm.replace({"train.learning_rate": 1e-12})
    new, _, _ = open_run(train(warm).run_dir)
    assert_same(logits(new), logits(model))
    with pytest.raises(ConfigError, match=r"rows of 2 new tokens.*adapter.train_new_tokens=true"):
        train(warm.replace({"adapter.train_new_tokens": False, "output.run_dir": str(tmp_path / "x"), **GROWN(config)}))


def GROWN(config) -> dict[str, str]:
    """A base that has the rows already, in whose embedding nothing trains."""
    model = AutoModelForCausalLM.from_pretrained(config.model.name)
    model.resize_token_embeddings(35)
    folder = Path(config.model.name).parent / "grown"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(config.model.name).save_pretrained(folder)
    return {"model.name": str(folder)}


def test_what_cannot_be_is_refused_by_name(config) -> None:
    with pytest.raises(ModelError, match="the tokenizer has 35 tokens, the embedding 33 rows"):
        train(config.replace({"adapter.train_new_tokens": False}))
    with pytest.raises(ConfigError, match="train_embeddings and train_new_tokens exclude each other"):
        train(config.replace({"adapter.train_embeddings": True}))
    with pytest.raises(ConfigError, match=r"adapter\.train_new_tokens: the embedding must stay in its place"):
        train(config.replace({"engine.stream": "file"}))


def test_where_there_are_none_it_says_so(make_config: MakeConfig) -> None:
    events = []
    assert train(make_config(adapter__train_new_tokens=True, train__steps=1), on_event=events.append).finished
    assert any("every token of the tokenizer has a row already" in e.text for e in events if e.kind == "warning")
