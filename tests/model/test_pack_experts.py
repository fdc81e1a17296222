"""Stacked experts of real families in few bits: exact, reported, saved and loaded."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.model_folders import byte_tokenizer
from tests.moe_models import FAMILIES, save_mixture
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from longfit.errors import ModelError
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model.load import load, load_report
from longfit.model.pack_experts import packed_parameters

IDS = torch.arange(3, 20)[None]


@pytest.fixture(params=FAMILIES)
def mixture_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_mixture(tmp_path / request.param, request.param)


def close_to_eager(family: str) -> dict[str, float]:
    """Float64, but for Nemotron-H, whose own loop sums a token's experts in the router's float32."""
    return {"rtol": 1e-4, "atol": 1e-6} if family == "nemotron_h" else {"rtol": 1e-9, "atol": 1e-13}


def dense_twin(folder: Path, packed: nn.Module) -> nn.Module:
    """The model as transformers runs it by itself, with dq(W) for every quantised weight."""
    dense, _ = load(folder, quant="none", dtype=packed.dtype)
    dense.set_experts_implementation("eager")
    for name, module in packed.named_modules():
        if isinstance(module, QuantizedLinear):
            dense.get_submodule(name).weight.data = module.dequantize(packed.dtype)
    for name, experts, leaf, rows in packed_parameters(packed):
        parameter = dense.get_parameter(name)
        weight = experts.dequantize(leaf, rows, packed.dtype)
        assert weight.shape == parameter.shape
        parameter.data = weight
    return dense


def test_a_mixture_equals_the_dense_model_of_its_weights(mixture_folder: Path) -> None:
    model, _ = load(mixture_folder, dtype=torch.float64)
    dense = dense_twin(mixture_folder, model)
    assert any(True for _ in packed_parameters(model))
    embedded = model.get_input_embeddings()(IDS).detach()
    outputs = []
    for each in (model, dense):
        each.requires_grad_(False)
        x = embedded.clone().requires_grad_()
        loss = each(inputs_embeds=x, labels=IDS).loss
        outputs.append((loss, *torch.autograd.grad(loss, x)))
    for mine, plain in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, plain, **close_to_eager(mixture_folder.name))


def test_the_report_counts_experts_with_the_bits_of_linear_layers(mixture_folder: Path) -> None:
    model, _ = load(mixture_folder, block_size=32)
    report = load_report(model)
    experts = [name for name, *_ in packed_parameters(model)]
    assert set(experts) <= set(report.quantized)
    assert not set(experts) & report.dense.keys()
    dense, _ = load(mixture_folder, quant="none")
    assert report.half_bytes == sum(2 * parameter.numel() for parameter in dense.parameters())
    # Codes 4 bits, constants 8 / 32; each weight's own 8 bytes and constants of its constants come to little.
    assert 4.25 < report.bits_per_param < 4.5
    quantised = sum(dense.get_parameter(name).numel() for name in experts)
    quantised += sum(dense.get_submodule(n).weight.numel() for n in report.quantized if n not in experts)
    assert report.quantized_share == quantised / sum(parameter.numel() for parameter in dense.parameters())


def test_saving_and_loading_keeps_every_byte(mixture_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(mixture_folder)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        written = [key for key in list(file.keys()) if ".packed." in key]
    assert len(written) == 2 * len(list(packed_parameters(model)))
    again, _ = load(tmp_path / "saved")
    for (name, _, _, rows), (name_again, _, _, rows_again) in zip(
        packed_parameters(model), packed_parameters(again), strict=True
    ):
        assert name == name_again
        assert torch.equal(rows, rows_again)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_experts_can_be_left_dense_by_name(tmp_path: Path) -> None:
    folder = save_mixture(tmp_path, "mixtral")
    model, _ = load(folder, skip_modules=["experts"], dtype=torch.float32)
    report = load_report(model)
    assert report.dense["model.layers.0.mlp.experts.down_proj"] == "named in skip_modules"
    assert not list(packed_parameters(model))
    partly, _ = load(folder, skip_modules=["model.layers.0.mlp.experts"], dtype=torch.float32)
    assert [name for name, *_ in packed_parameters(partly)] == [
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]
    assert partly(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("quant", ["int8", "fp4", "int4"])
def test_other_data_types(tmp_path: Path, quant: str) -> None:
    folder = save_mixture(tmp_path, "gpt_oss")
    model, _ = load(folder, quant=quant, dtype=torch.float64)
    dense = dense_twin(folder, model)
    torch.testing.assert_close(model(input_ids=IDS).logits, dense(input_ids=IDS).logits, rtol=1e-12, atol=1e-13)


def test_what_the_interface_does_not_serve_stays_dense_and_is_named(tmp_path: Path) -> None:
    from tests.model_folders import byte_tokenizer
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=258,
        hidden_size=48,
        intermediate_size=40,
        intermediate_size_mlp=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_local_experts=2,
    )
    Llama4ForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    reasons = [why for name, why in load_report(model).dense.items() if "experts" in name]
    assert reasons
    assert all("Llama4TextExperts multiplies by itself" in why for why in reasons)


def test_a_constant_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model, tokenizer = load(save_mixture(tmp_path / "base", "mixtral"))
    packed = model.model.layers[1].mlp.experts.packed
    packed.down_proj_constants[2, -4:] = 0xFF
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.down_proj holds NaN"):
        load(tmp_path / "broken")


def test_a_bitsandbytes_mixture_keeps_its_experts_dense_and_its_layers_packed(tmp_path: Path) -> None:
    """bitsandbytes packs linear layers alone; what it packed is what longfit packs of the same weights."""
    base = save_mixture(tmp_path / "base", "qwen3_moe")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    byte_tokenizer().save_pretrained(tmp_path / "theirs")
    loaded, _ = load(tmp_path / "theirs", dtype=torch.float32)
    ours, _ = load(base, dtype=torch.float32, skip_modules=["experts"])
    assert not list(packed_parameters(loaded))
    assert "dense in this checkpoint" in set(load_report(loaded).dense.values())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found, expected = (model(input_ids=ids).logits for model in (loaded, ours))
    assert torch.equal(found, expected)
