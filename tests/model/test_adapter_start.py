"""Adapters that begin with what rounding lost: the base keeps its bytes, files stay plain LoRA, the rest is refused."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.model_folders import byte_tokenizer
from tests.moe_models import save_mixture
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from longfit.errors import ModelError
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model.adapters import adapter_report, add_adapters
from longfit.model.load import load
from longfit.model.save import load_adapter, save_adapter

TEXT = torch.arange(3, 40)[None]
RANK = 4


def quantised(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


@pytest.mark.parametrize(
    "settings", [{"quant": "nf4"}, {"quant": "int8"}, {"quant": "int4", "block_size": 32}], ids=str
)
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_base_and_adapter_are_the_nearest_of_that_rank(folder: Path, settings, rank_stabilised):
    plain, _ = load(folder, dtype=torch.float32, **settings)
    dense, _ = load(folder, dtype=torch.float32, quant="none")
    model, _ = load(folder, dtype=torch.float32, **settings, start="loftq", start_rank=RANK)
    for name, layer in quantised(plain).items():
        assert torch.equal(layer.weight, model.get_submodule(name).weight), name
    merged = add_adapters(model, rank=RANK, alpha=7, rank_stabilised=rank_stabilised).merge_and_unload()
    for name, layer in quantised(plain).items():
        weight = dense.get_submodule(name).weight.detach()
        lost = weight - layer.dequantize(torch.float32)
        left = torch.linalg.svdvals(lost)[RANK:].square().sum().sqrt()  # what no matrix of this rank can do better
        # Subspace iteration and two roundings of products: it may miss 1 % of what is left, and can gain nothing.
        found = (weight - merged.get_submodule(name).weight).norm()
        assert 0.999 * left <= found <= 1.01 * left, name


def test_its_files_are_plain_lora_of_the_plain_base(folder: Path, tmp_path: Path):
    model, tokenizer = load(folder, dtype=torch.float32, start="loftq", start_rank=RANK)
    adapted = add_adapters(model, rank=RANK, alpha=7).eval()
    expected = adapted(input_ids=TEXT).logits
    assert not torch.equal(expected, load(folder, dtype=torch.float32)[0](input_ids=TEXT).logits)
    save_adapter(adapted, tokenizer, tmp_path / "adapter")
    again, _ = load(folder, dtype=torch.float32)
    assert torch.equal(load_adapter(again, tmp_path / "adapter").eval()(input_ids=TEXT).logits, expected)
    # PEFT's own layers, on a dense base that holds dq(W): the order of sums differs.
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in quantised(load(folder, dtype=torch.float32)[0]).items():
        dense.get_submodule(name).weight.data = layer.dequantize(torch.float32)
    found = PeftModel.from_pretrained(dense, tmp_path / "adapter")(input_ids=TEXT).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_report_says_what_it_repairs(folder: Path):
    model, _ = load(folder, start="loftq", start_rank=RANK)
    adapted = add_adapters(model, rank=RANK, targets=["q_proj"])
    start = adapter_report(adapted).start
    assert start is not None
    assert start.num_layers == 2
    assert 0 < start.left < start.lost < 0.2
    assert "adapters of 2 layers begin with what rounding lost" in str(adapter_report(adapted))
    assert not any("first_values" in layer.__dict__ for layer in adapted.modules())  # nothing waits any more
    assert adapter_report(add_adapters(load(folder)[0])).start is None


def test_a_weight_the_other_way_round(tmp_path: Path):
    config = GPT2Config(vocab_size=258, n_embd=64, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    dense = GPT2LMHeadModel(config).eval()
    dense.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    expected = dense(input_ids=TEXT).logits
    plain, _ = load(tmp_path, dtype=torch.float32)
    model, _ = load(tmp_path, dtype=torch.float32, start="loftq", start_rank=32)
    begun = add_adapters(model, rank=32)(input_ids=TEXT).logits
    assert (begun - expected).norm() < 0.8 * (plain(input_ids=TEXT).logits - expected).norm()


def test_what_cannot_hold_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="must be one of standard, loftq"):
        load(folder, start="pissa")
    with pytest.raises(ModelError, match="nothing is rounded"):
        load(folder, quant="none", start="loftq")
    model, tokenizer = load(folder, start="loftq", start_rank=RANK)
    with pytest.raises(ModelError, match="loaded with a start of rank 4, the adapter has rank 8"):
        add_adapters(model, rank=8)
    model, _ = load(folder)
    model.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    with pytest.raises(ModelError, match="what rounding lost is not in it; give the 16-bit model"):
        load(tmp_path / "packed", start="loftq")


def test_experts_are_not_begun(tmp_path: Path):
    save_mixture(tmp_path, "qwen3_moe")
    model, _ = load(tmp_path, start="loftq", start_rank=RANK)
    with pytest.raises(ModelError, match="experts with start='loftq'"):
        add_adapters(model, rank=RANK, experts=True)
    assert adapter_report(add_adapters(model, rank=RANK)).start is not None
