"""A tokenizer larger than the embedding is caught when the model is loaded, or its new tokens get rows that train."""

from pathlib import Path

import pytest
import torch
from tests.model_folders import byte_tokenizer, save_model
from transformers import AutoModelForCausalLM

import longfit
from longfit.errors import ModelError
from longfit.model.adapters import add_adapters
from longfit.model.load import load
from longfit.model.save import load_adapter, save_adapter
from longfit.model.vocabulary import added_rows

IDS = torch.tensor([[1, 258, 7, 259, 9, 30, 258, 4]])


def save_grown(folder: Path, **options: object) -> Path:
    """A base of 258 rows with a tokenizer of 260 tokens."""
    save_model(folder, **{"dtype": torch.float32, **options})
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|model|>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_both_numbers_are_named_with_a_way_out(tmp_path: Path) -> None:
    base = save_grown(tmp_path / "base")
    message = r"has 260 tokens, the embedding 258 rows: '<\|user\|>' \(token 258\).*adapter.train_new_tokens=true"
    with pytest.raises(ModelError, match=message):
        load(base, quant="none")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_new_rows_begin_as_the_mean_of_the_others(tied: bool, quant: str, tmp_path: Path) -> None:
    model, _ = load(save_grown(tmp_path / "base", tied=tied), quant=quant, dtype=torch.float32, resize_embeddings=True)
    assert added_rows(model.config) == range(258, 260)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for found, before in (
        (model.get_input_embeddings().weight, original.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, original.get_output_embeddings().weight),
    ):
        assert torch.equal(found[:258], before)
        assert torch.equal(found[258:], before.mean(0).expand(2, -1))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_new_rows_train_and_come_back(tied: bool, tmp_path: Path) -> None:
    """The tiled loss is the model's own, with the rows that the adapter holds; so is what is loaded from its files."""
    base = save_grown(tmp_path / "base", tied=tied)
    model, tokenizer = load(base, quant="none", dtype=torch.float32, resize_embeddings=True)
    model = add_adapters(model, rank=2, train_new_tokens=True)
    assert "rows of 2 new tokens" in str(longfit.reports(model).adapters)
    rows = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {tuple(p.shape) for p in rows.values()} == {(2, 64)}
    assert len(rows) == (1 if tied else 2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    loss = longfit.training_loss(model.train(), IDS)
    ours = torch.autograd.grad(loss, list(rows.values()))
    longfit.disable_sweep(model)
    plain = model(input_ids=IDS, labels=IDS).loss
    theirs = torch.autograd.grad(plain, list(rows.values()))
    # Float32: sums of 64 terms in another order, about twenty of them one after the other.
    assert abs(float(loss.detach() - plain.detach())) <= 64 * 20 * 2.0**-24 * float(plain.detach())
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= 64 * 20 * 2.0**-24 * other.abs().max()
        assert other.abs().max() > 0
    save_adapter(model, tokenizer, tmp_path / "adapter")
    again, _ = load(base, quant="none", dtype=torch.float32, resize_embeddings=True)
    again = load_adapter(again, tmp_path / "adapter").eval()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    with torch.no_grad():
        found, expected = again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits
        with again.disable_adapter():
            assert (again(input_ids=IDS).logits - expected).abs().max() > 0.1
    assert (found - expected).abs().max() <= 64 * 20 * 2.0**-24 * expected.abs().max()


def test_what_cannot_be_given_rows_is_refused(tmp_path: Path) -> None:
    base = save_grown(tmp_path / "base")
    model, _ = load(base, quant="none", resize_embeddings=True)
    with pytest.raises(ModelError, match="train_embeddings trains all rows"):
        add_adapters(model, train_new_tokens=True, train_embeddings=True)
    whole, _ = load(save_model(tmp_path / "whole"), quant="none", resize_embeddings=True)
    with pytest.raises(ModelError, match="no rows were added to this model"):
        add_adapters(whole, train_new_tokens=True)
    from longfit.model.vocabulary import add_rows

    odd = AutoModelForCausalLM.from_pretrained(base)
    odd.register_parameter("per_token", torch.nn.Parameter(torch.zeros(258, 3)))
    with pytest.raises(ModelError, match="per_token has a row a token, too"):
        add_rows(odd, byte_tokenizer_of(base), "odd")
    odd = AutoModelForCausalLM.from_pretrained(base)
    odd.lm_head = torch.nn.Linear(64, 258)
    with pytest.raises(ModelError, match="its output matrix is a Linear with a bias"):
        add_rows(odd, byte_tokenizer_of(base), "odd")


def byte_tokenizer_of(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_a_padded_embedding_is_no_mistake(tmp_path: Path) -> None:
    save_model(tmp_path / "base", vocab_size=320)
    assert load(tmp_path / "base", quant="none")[0].get_input_embeddings().weight.shape[0] == 320
