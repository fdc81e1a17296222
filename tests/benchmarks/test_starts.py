"""The rows of the experiment on starts: each base is what its name says, and an adapter begins where it should."""

import pytest
import torch
from benchmarks.experiments import starts
from benchmarks.experiments.cells import Cells
from tests.model_folders import llama

from longfit.attention.hf_attention import attention_key
from longfit.layers.linear4bit import Linear4bit
from longfit.layers.linear8bit import Linear8bit
from longfit.model.adapters import add_adapters

TEXT = torch.arange(3, 40)


def dense():
    model = llama().float()
    model.set_attn_implementation(attention_key())
    return model


@pytest.mark.parametrize("base", starts.BASES)
def test_a_base_is_what_its_name_says(base):
    model = dense()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    begun = starts.store(model, base, text=TEXT)
    layers = [model.get_submodule(name) for name in names]
    four = [layer for layer in layers if isinstance(layer, Linear4bit)]
    eight = [layer for layer in layers if isinstance(layer, Linear8bit)]
    quantised = len(layers) - 1  # all but the head
    expected = {"16 bits": (0, 0), "INT8": (0, quantised)}
    if base == "mixed":
        assert four
        assert eight
    else:
        assert (len(four), len(eight)) == expected.get(base, (quantised, 0))
    assert {layer.row_format.block_size for layer in four} <= {32 if base == "NF4, blocks of 32" else 64}
    assert len(begun) == (quantised if base in ("NF4, LoftQ", "NF4, PiSSA") else 0)


@pytest.mark.parametrize("base", ["NF4, LoftQ", "NF4, PiSSA"])
def test_base_and_start_together_are_nearer_to_the_weights(base):
    exact, plain, repaired = dense(), dense(), dense()
    starts.store(plain, "NF4", text=TEXT)
    begun = starts.store(repaired, base, text=TEXT)
    model = starts.begin(add_adapters(repaired, rank=16, alpha=32), begun)
    merged = model.merge_and_unload()
    for name, layer in plain.named_modules():
        if isinstance(layer, Linear4bit):
            weight = exact.get_submodule(name).weight
            before = (layer.dequantize(torch.float32) - weight).norm()
            after = (merged.get_submodule(name).weight - weight).norm()
            assert after < 0.9 * before, name


def test_the_table_compares_seed_by_seed(tmp_path):
    found = Cells(tmp_path / "starts.json")

    def measure(settings):
        loss = {"16 bits": 2.0, "NF4": 2.3}[settings["base"]] + settings["seed"]
        return {"held_out": {"0": {"a": 3.0}, "4": {"a": loss}}, "stored_bytes": 10**6}

    chosen = [{"base": base, "seed": seed, "window": 1, "steps": 4} for base in ("16 bits", "NF4") for seed in (0, 1)]
    found.run(chosen, measure)
    assert "| NF4 | 1 MB | 3.000 +- 0.000 | 2.800 +- 0.707 | 0.300 +- 0.000 | 2 |" in starts.table(found)
