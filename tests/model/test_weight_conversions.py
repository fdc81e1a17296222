"""A checkpoint with fused tensors is cut for layers in few bits, and what they hold is saved as it is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.families.tiny_family import tiny_family
from tests.model_folders import byte_tokenizer

from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model.load import load

FUSED = {"sarvam_moe": "query_key_value", "hrm_text": "gqkv_proj", "lara_mini": "linear_attn.in_proj."}


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("kind", FUSED)
def test_fused_weights_are_cut_and_never_joined_again(kind: str, quant: str, tmp_path: Path) -> None:
    family = tiny_family(kind, vocab_size=258)
    family.model.float().save_pretrained(tmp_path / "dense")
    assert any(FUSED[kind] in name for name in load_file(tmp_path / "dense" / "model.safetensors"))
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "packed")
    model, _ = load(tmp_path / "dense", quant=quant, dtype=torch.float32)
    weights = {name: m.dequantize() for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    dense = dict(family.model.named_modules())
    for name, weight in weights.items():  # each is the layer's own, in another number of bits
        expected = dense[name].weight
        assert (weight - expected).norm() < 0.2 * expected.norm(), name
    model.save_pretrained(tmp_path / "packed")
    assert not any(FUSED[kind] in name for name in load_file(tmp_path / "packed" / "model.safetensors"))
    again, _ = load(tmp_path / "packed", quant=quant, dtype=torch.float32)
    for name, weight in weights.items():
        assert torch.equal(again.get_submodule(name).dequantize(), weight), name


def test_a_packed_weight_that_other_code_reads_is_made_dense(tmp_path: Path) -> None:
    """bitsandbytes packs Mamba's ``dt_proj``, whose weight the model then multiplies by itself."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    family = tiny_family("mamba", vocab_size=258)
    family.model.float().save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    byte_tokenizer().save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    assert any(name.endswith("dt_proj.weight.absmax") for name in stored)
    model, _ = load(tmp_path / "theirs", dtype=torch.float32)
    for name, layer in family.model.named_modules():
        if name.endswith("dt_proj"):
            found = model.get_submodule(name).weight
            assert found.dtype == torch.float32
            assert (found - layer.weight).norm() < 0.2 * layer.weight.norm()
    with torch.no_grad():
        model(input_ids=torch.arange(9)[None])
