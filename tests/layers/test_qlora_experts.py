"""Adapters on packed experts: PEFT's own numbers, names and files."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from tests.model.test_pack_experts import IDS, close_to_eager, dense_twin
from tests.moe_models import save_mixture
from torch import nn
from transformers import AutoModelForCausalLM

from longfit.errors import ModelError
from longfit.model.adapters import add_adapters, register_layers
from longfit.model.load import load
from longfit.model.pack_experts import packed_parameters
from longfit.model.save import load_adapter, save_adapter


def trained(folder: Path) -> tuple[PeftModel, object]:
    """A model in float64 with adapters on all linear layers and experts, as after some steps."""
    model, tokenizer = load(folder, dtype=torch.float64)
    adapted = add_adapters(model, rank=3, alpha=5, experts=True).double()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted, tokenizer


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_plain_peft_reads_the_file_and_has_the_same_gradients(family: str, tmp_path: Path) -> None:
    folder = save_mixture(tmp_path / "base", family)
    twin = dense_twin(folder, load(folder, dtype=torch.float64)[0])
    adapted, tokenizer = trained(folder)
    save_adapter(adapted, tokenizer, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(twin, tmp_path / "adapter", is_trainable=True).double()
    gradients = []
    for model in (adapted, plain):
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(".experts." in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], **close_to_eager(family))


def test_an_adapter_comes_back(tmp_path: Path) -> None:
    folder = save_mixture(tmp_path / "base", "qwen3_moe")
    adapted, tokenizer = trained(folder)
    before = adapted(input_ids=IDS).logits
    save_adapter(adapted, tokenizer, tmp_path / "adapter")
    again = load_adapter(load(folder, dtype=torch.float64)[0], tmp_path / "adapter").double()
    # PEFT reads an adapter's float64 as float32: 2**-24 of each of its numbers.
    torch.testing.assert_close(again(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-6)


def test_merging_gives_dense_experts_that_transformers_computes(tmp_path: Path) -> None:
    adapted, _ = trained(save_mixture(tmp_path, "gpt_oss"))
    before = adapted(input_ids=IDS).logits
    merged = adapted.merge_and_unload()
    assert not list(packed_parameters(merged))
    # Merged in float32: 2**-24 of each weight.
    torch.testing.assert_close(merged(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)


def test_a_merged_model_is_saved_as_a_dense_one(tmp_path: Path) -> None:
    model, _ = load(save_mixture(tmp_path / "base", "gpt_oss"), dtype=torch.float32)
    merged = add_adapters(model, experts=True).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=merged.dtype)
    assert torch.equal(again(input_ids=IDS).logits, merged(input_ids=IDS).logits)


def test_unloading_gives_the_packed_experts_back(tmp_path: Path) -> None:
    folder = save_mixture(tmp_path, "gpt_oss")
    adapted, _ = trained(folder)
    base, _ = load(folder, dtype=torch.float64)
    assert torch.equal(adapted.unload()(input_ids=IDS).logits, base(input_ids=IDS).logits)


def test_merging_into_the_codes_is_refused(tmp_path: Path) -> None:
    adapted, _ = trained(save_mixture(tmp_path, "mixtral"))
    with pytest.raises(ModelError, match="merge_and_unload"):
        adapted.merge_adapter()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "dropout 0"),
        ({"targets": ["q_proj", "w1"]}, "no such linear layers"),
    ],
)
def test_what_experts_do_not_carry_is_named(tmp_path: Path, options: dict[str, object], message: str) -> None:
    model, _ = load(save_mixture(tmp_path, "mixtral"))
    with pytest.raises(ModelError, match=message):
        add_adapters(model, experts=True, **options)


def test_a_start_that_reads_the_weight_is_refused(tmp_path: Path) -> None:
    from peft import get_peft_model

    model, _ = load(save_mixture(tmp_path, "mixtral"))
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"], init_lora_weights="pissa")
    register_layers(config, model)
    with pytest.raises(ModelError, match="pissa"):
        get_peft_model(model, config)
