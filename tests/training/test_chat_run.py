"""A run on chats: its template goes with the adapter; whoever uses the run asks and stops as it was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.chat_templates import SHAPES, make_tokenizer
from tests.model_folders import llama
from transformers import AutoTokenizer, GenerationConfig

from longfit.cli.app import main
from longfit.config import RunConfig
from longfit.data.encoding import encode_prompt
from longfit.data.template import choose_template
from longfit.evaluation.generate import Conversation, end_tokens
from longfit.training.loop import train
from longfit.training.prepare import open_target
from longfit.training.prepare_data import read_path, read_token_ids
from longfit.training.run_directory import read_config, seen_note

ROWS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"the answer is {n}"}]}
    for n in range(8)
]


def make_base(folder: Path, family: str) -> Path:
    tokenizer = make_tokenizer(SHAPES[family])
    tokenizer.save_pretrained(folder)
    model = llama(dtype=torch.float32, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    return folder


def run_on_chats(folder: Path, family: str, **settings: Any) -> Path:
    base = make_base(folder / "base", family)
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    given = {"model.name": str(base), "data.path": str(data), "model.quant": "none", "model.dtype": "float32"}
    given |= {"context.context": 128, "train.steps": 2, "output.run_dir": str(folder / "run")}
    return train(RunConfig.of({**given, **settings}), on_event=lambda event: None).run_dir


def test_a_base_model_learns_chatml_and_its_run_keeps_it(tmp_path: Path) -> None:
    run = run_on_chats(tmp_path, "built-in chatml", **{"data.chat_template": "chatml"})
    saved = AutoTokenizer.from_pretrained(run / "adapter")
    template = choose_template(saved)
    question = [{"role": "user", "content": "say 3"}]
    assert saved.apply_chat_template(question, add_generation_prompt=True, tokenize=False) == template.render(
        question, add_generation_prompt=True
    )
    assert read_config(run).data.date is not None
    model, tokenizer = open_target(run)
    asked = Conversation(model, tokenizer).prompt("say 3").tolist()
    assert asked == encode_prompt(question, saved, template=template).tolist()
    rows = read_token_ids(str(tmp_path / "chats.jsonl"), tokenizer, data=read_config(run).data)
    assert rows[3].tolist()[: len(asked)] == asked
    assert asked.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("family", ["Gemma-3", "Phi-3", "GLM-4"])
def test_the_token_that_ends_an_answer_stops_the_chat(family: str, tmp_path: Path) -> None:
    run = run_on_chats(tmp_path, family)
    model, tokenizer = open_target(run)
    end = tokenizer.convert_tokens_to_ids(SHAPES[family].end)
    assert end != tokenizer.eos_token_id
    assert {end, tokenizer.eos_token_id} <= end_tokens(model, tokenizer)
    assert end in GenerationConfig.from_pretrained(run / "adapter").eos_token_id


def test_a_run_knows_the_documents_that_it_was_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_on_chats(tmp_path, "ChatML (SmolLM2)")
    config = read_config(run).data
    new = {"messages": [{"role": "user", "content": "new"}, {"role": "assistant", "content": "text"}]}
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:2], new]), encoding="utf-8")
    assert seen_note(run, read_path(str(mixed), config)) == (
        "2 of 3 documents are among those that this run was trained on"
    )
    mixed.write_text(json.dumps(new), encoding="utf-8")
    assert seen_note(run, read_path(str(mixed), config)) is None
    assert main(["eval", str(run), "ppl", "--data", str(tmp_path / "chats.jsonl"), "--window", "16"]) == 0
    assert "warning: 8 of 8 documents are among those that this run was trained on" in capsys.readouterr().err
