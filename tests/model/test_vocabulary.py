"""A tokenizer larger than the embedding is caught when the model is loaded, with both numbers; the way out works."""

from pathlib import Path

import pytest
import torch
from tests.model_folders import byte_tokenizer, save_model
from transformers import AutoModelForCausalLM

from longfit.errors import ModelError
from longfit.model.load import load


def test_both_numbers_are_named_and_the_way_out_works(tmp_path: Path) -> None:
    save_model(tmp_path / "base", dtype=torch.float32)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|model|>"])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"has 260 tokens, the embedding 258 rows: '<\|user\|>' \(token 258\)"):
        load(tmp_path / "base", quant="none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(260)
    model.save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    grown, found = load(tmp_path / "grown", quant="none")
    assert grown.get_input_embeddings().weight.shape[0] == len(found) == 260


def test_a_padded_embedding_is_no_mistake(tmp_path: Path) -> None:
    save_model(tmp_path / "base", vocab_size=320)
    assert load(tmp_path / "base", quant="none")[0].get_input_embeddings().weight.shape[0] == 320
