"""Adapters sit on every linear layer; embeddings and norms train where asked for, at the paper's learning rate."""

from pathlib import Path

import pytest
import torch
from tests.families.tiny_family import tiny_family
from tests.model_folders import byte_tokenizer, llama
from torch import nn

from longfit.engine.loss.training_loss import training_loss
from longfit.errors import ModelError
from longfit.layers.linear4bit import Linear4bit
from longfit.layers.qlora import QLoRALinear
from longfit.model.adapters import adapter_report, add_adapters
from longfit.model.load import load
from longfit.model.save import load_adapter, save_adapter
from longfit.optim.adamw import PagedAdamW

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_every_linear_layer_but_the_head_is_adapted(folder: Path, quant: str) -> None:
    model, _ = load(folder, quant=quant)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Linear4bit)}
    total = sum(parameter.numel() for parameter in llama(attention_bias=True).parameters())
    adapted = add_adapters(model, rank=4)
    report = adapter_report(adapted)
    prefix = "base_model.model."
    assert set(report.adapted) == {prefix + name for name in linears - {"lm_head"}}
    assert {name.rsplit(".", 1)[-1] for name in report.adapted} == PROJECTIONS
    layers = [adapted.get_submodule(name) for name in report.adapted]
    expected = sum(4 * (layer.in_features + layer.out_features) for layer in layers)
    assert report.trainable_params == expected
    assert report.total_params == total + expected
    assert report.trained_whole == ()
    assert all(isinstance(layer, QLoRALinear) for layer in layers) == (quant == "nf4")
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert {adapted.get_parameter(name).dtype for name in trained} == {torch.float32}


def test_a_stabilised_scaling_divides_by_the_root_of_the_rank(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder, quant="nf4")
    adapted = add_adapters(model, rank=16, alpha=8, rank_stabilised=True, targets=["q_proj"])
    save_adapter(adapted, tokenizer, tmp_path)
    again = load_adapter(load(folder, quant="nf4")[0], tmp_path)
    for each in (adapted, again):
        scalings = {module.scaling["default"] for module in each.modules() if isinstance(module, QLoRALinear)}
        assert scalings == {8 / 4}


def test_only_the_targets_asked_for_are_adapted(folder: Path) -> None:
    model, _ = load(folder, quant="nf4")
    report = adapter_report(add_adapters(model, targets=["q_proj", "v_proj"]))
    assert {name.rsplit(".", 1)[-1] for name in report.adapted} == {"q_proj", "v_proj"}
    assert len(report.adapted) == 4  # two in each of two layers


def test_an_unknown_target_is_refused_and_the_others_named(folder: Path) -> None:
    model, _ = load(folder, quant="nf4")
    with pytest.raises(ModelError, match=r"targets qq_proj: no such linear layers.*down_proj.*q_proj") as error:
        add_adapters(model, targets=["q_proj", "qq_proj"])
    assert all(name in str(error.value) for name in PROJECTIONS)


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_a_second_adapter_is_refused(folder: Path, quant: str) -> None:
    """Also on the model inside, whose layers were replaced in place."""
    model, _ = load(folder, quant=quant)
    adapted = add_adapters(model)
    for again in (adapted, model):
        with pytest.raises(ModelError, match="adapters already"):
            add_adapters(again)


@pytest.mark.parametrize("setting", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_settings_out_of_range_are_named(setting: dict[str, float]) -> None:
    (name,) = setting
    with pytest.raises(ModelError, match=rf"{name}={setting[name]}: must be at least"):
        add_adapters(llama(), **setting)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_norms_move_and_are_saved(tmp_path: Path, tied: bool) -> None:
    """Twenty steps at 2e-5 move a weight by at most about 4e-4, which bfloat16 cannot show on a norm weight of 1.

    The neighbours of 1 are 1 - 2^-8 and 1 + 2^-7: the masters move, the weight rightly stays. Norms start at 2^-7 here,
    whose neighbours are 2^-15 = 3e-5 below and 2^-14 = 6e-5 above: twenty steps pass them.
    """
    base = llama(tied=tied)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "norm" in name:
                parameter.fill_(2.0**-7)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base", quant="nf4", dtype=torch.bfloat16)
    adapted = add_adapters(model, rank=2, train_embeddings=True, train_norms=True)
    report = adapter_report(adapted)
    assert sum("norm" in name for name in report.trained_whole) == 5  # two in each of two layers, one at the end
    assert sum("embed_tokens" in name for name in report.trained_whole) == 1

    whole = {n: p for n, p in adapted.named_parameters() if p.requires_grad and "lora_" not in n}
    before = {name: parameter.detach().clone() for name, parameter in whole.items()}
    assert {parameter.dtype for parameter in whole.values()} == {torch.bfloat16}
    optimizer = PagedAdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-5, weight_decay=0.0)
    ids = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(1))
    adapted.train()
    for _ in range(20):
        training_loss(adapted, ids, engine="plain").backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in whole.items():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"
    embedding = model.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is embedding) == tied

    adapted.eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
    save_adapter(adapted, tokenizer, tmp_path / "adapter")
    fresh, _ = load(tmp_path / "base", quant="nf4", dtype=torch.bfloat16)
    loaded = load_adapter(fresh, tmp_path / "adapter").eval()
    moved = dict(loaded.named_parameters())
    for name, parameter in whole.items():
        assert torch.equal(moved[name], parameter), f"{name} was not saved"
    assert (fresh.get_output_embeddings().weight is fresh.get_input_embeddings().weight) == tied
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("llama4_text", "router", "a Llama4Router computes more than a product"),
        ("mamba", "out_proj", "read by other code"),
        ("laguna", "mlp.shared_experts.up_proj", "PEFT renames its adapter"),
        ("gemma3", "vision_tower", "outside of the decoder (Gemma3TextModel)"),
    ],
)
def test_layers_that_cannot_have_an_adapter_are_left_out_and_named(kind: str, name: str, reason: str) -> None:
    model = tiny_family(kind, dtype=torch.float32).model
    report = adapter_report(add_adapters(model, rank=2))
    found = {layer: why for layer, why in report.untargeted.items() if name in layer}
    assert found
    assert all(reason in why for why in found.values())
    assert not any(name in layer for layer in report.adapted)
    assert reason in str(report)


def test_a_named_target_that_cannot_have_an_adapter_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match="targets router: no adapter there, a Llama4Router computes more than"):
        add_adapters(tiny_family("llama4_text").model, targets=["q_proj", "router"])


def test_only_the_decoder_of_a_multimodal_model_trains() -> None:
    """15 of 29 adapters of a tiny Gemma-3 were in its vision tower, where text gives them no gradient."""
    family = tiny_family("gemma3", dtype=torch.float32)
    adapted = add_adapters(family.model, rank=2, train_embeddings=True, train_norms=True)
    training_loss(adapted, family.tokens(1, 20), engine="plain").backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.split(".")[3] for name in trained} <= {"language_model", "embed_tokens", "lm_head"}
    assert all(p.grad is not None for p in trained.values())
