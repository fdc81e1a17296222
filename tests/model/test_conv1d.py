"""GPT-2's `Conv1D`, whose weights are `[in, out]`: quantised, adapted, merged and saved like linear layers."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file
from tests.model_folders import byte_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from longfit.exporting.base_weights import FolderWeights, QuantizedWeights, conv1d_weights, quantized_weights
from longfit.layers.linear4bit import Linear4bit
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model.adapters import add_adapters
from longfit.model.load import load, load_report
from longfit.model.save import load_adapter, save_adapter

IDS = torch.arange(3, 20)[None]
NUM_LAYERS, NUM_CONV1D = 2, 4  # of a layer: c_attn, c_proj twice (one of them square), c_fc


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    folder = tmp_path / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_positions=64, n_embd=64, n_layer=NUM_LAYERS, n_head=4, n_inner=128)
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def dense_twin(folder: Path, packed: nn.Module) -> nn.Module:
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, module in packed.named_modules():
        if isinstance(module, QuantizedLinear):
            dense.get_submodule(name).weight.data = module.dequantize(torch.float64).t().contiguous()
    return dense


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_every_conv1d_is_quantised_and_exact(gpt2: Path, quant: str) -> None:
    model, _ = load(gpt2, quant=quant, dtype=torch.float64)
    assert len(load_report(model).quantized) == NUM_LAYERS * NUM_CONV1D
    dense = dense_twin(gpt2, model)
    torch.testing.assert_close(model(input_ids=IDS).logits, dense(input_ids=IDS).logits, rtol=1e-12, atol=1e-12)


def test_the_dense_ones_are_named(gpt2: Path) -> None:
    dense, _ = load(gpt2, quant="none")
    assert load_report(dense).dense["transformer.h.0.attn.c_attn"] == "loaded with quant='none'"
    model, _ = load(gpt2, skip_modules=["c_fc"])
    assert load_report(model).dense["transformer.h.1.mlp.c_fc"] == "named in skip_modules"
    assert isinstance(model.transformer.h[1].mlp.c_fc, Conv1D)


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Every layer holds the same dq(W) for longfit and for bitsandbytes."""
    for name in load_report(ours).quantized:
        layer, weight = ours.get_submodule(name), theirs.get_submodule(name).weight
        expected = dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(expected.view(layer.out_features, layer.in_features), layer.dequantize()), name


def test_bitsandbytes_loads_what_longfit_saved(gpt2: Path, tmp_path: Path) -> None:
    model, _ = load(gpt2, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16))


def test_a_bitsandbytes_checkpoint_loads(gpt2: Path, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(gpt2, quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    byte_tokenizer().save_pretrained(tmp_path / "theirs")
    ours, _ = load(tmp_path / "theirs", dtype=torch.bfloat16)
    assert len(load_report(ours).quantized) == NUM_LAYERS * NUM_CONV1D
    same_weights(ours, theirs)


def trained(folder: Path, *, dtype: torch.dtype = torch.float64) -> tuple[PeftModel, object]:
    model, tokenizer = load(folder, dtype=dtype)
    adapted = add_adapters(model, rank=3).to(dtype)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted, tokenizer


def test_adapters_are_plain_peft_files_in_both_directions(gpt2: Path, tmp_path: Path) -> None:
    adapted, tokenizer = trained(gpt2)
    twin = dense_twin(gpt2, load(gpt2, dtype=torch.float64)[0])
    before = adapted(input_ids=IDS).logits
    save_adapter(adapted, tokenizer, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(twin, tmp_path / "adapter").double()
    # PEFT reads an adapter's float64 as float32: 2**-24 of each of its numbers.
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(plain(input_ids=IDS).logits, before, **close)
    plain.save_pretrained(tmp_path / "plain")
    settings = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"]  # as whoever trains GPT-2 with PEFT alone has it
    again = load_adapter(load(gpt2, dtype=torch.float64)[0], tmp_path / "plain").double()
    torch.testing.assert_close(again(input_ids=IDS).logits, before, **close)


def test_a_merged_model_is_one_that_transformers_loads(gpt2: Path, tmp_path: Path) -> None:
    adapted, _ = trained(gpt2, dtype=torch.float32)
    before = adapted(input_ids=IDS).logits
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    # x W + (x A) B against x (W + B A), in float32: a rounding of each of some hundred products near 1.
    torch.testing.assert_close(again(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-4)


def test_a_partly_merged_model_says_which_layers_are_dense(gpt2: Path, tmp_path: Path) -> None:
    model, tokenizer = load(gpt2, dtype=torch.float32)
    merged = add_adapters(model, targets=["c_fc"]).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    again, _ = load(tmp_path / "merged", dtype=torch.float32)
    assert isinstance(again.transformer.h[0].mlp.c_fc, Conv1D)
    assert isinstance(again.transformer.h[0].mlp.c_proj, Linear4bit)
    assert torch.equal(again(input_ids=IDS).logits, merged(input_ids=IDS).logits)


def test_merging_from_files_quantises_what_load_quantised(gpt2: Path) -> None:
    model, _ = load(gpt2, dtype=torch.float32)
    skeleton = GPT2LMHeadModel(GPT2Config.from_pretrained(gpt2))
    files = QuantizedWeights(
        FolderWeights(gpt2),
        quantized_weights(skeleton),
        quant="nf4",
        double_quant=True,
        block_size=64,
        int8=set(),
        transposed=conv1d_weights(skeleton),
    )
    dense = load_file(gpt2 / "model.safetensors")
    for name in load_report(model).quantized:
        read = files.read(f"{name}.weight")
        assert read.shape == dense[f"{name}.weight"].shape
        assert torch.equal(read.t(), model.get_submodule(name).dequantize(torch.float32))
