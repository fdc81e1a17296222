"""A mixed base: the layers that lose most get 8 bits, as far as the budget goes, and are loaded so."""

from pathlib import Path

import pytest
import torch
from tests.model_folders import save_model
from tests.tiny_models import VOCABULARY, tiny_model

from longfit.attention.hf_attention import attention_key
from longfit.errors import ConfigError, ModelError
from longfit.evaluation.quant_error import DataType, round_to
from longfit.evaluation.quant_plan import LayerError, chosen, quant_plan
from longfit.layers.linear4bit import Linear4bit
from longfit.layers.linear8bit import Linear8bit
from longfit.model.load import load

LAYERS = [LayerError("a", 0.1, 10, 18), LayerError("b", 0.3, 100, 190), LayerError("c", 0.2, 10, 19)]


@pytest.mark.parametrize(
    ("budget", "names", "nbytes"),
    [(120, (), 120), (128, (), 128), (129, ("c",), 129), (137, ("c", "a"), 137), (10_000, ("b", "c", "a"), 227)],
)
def test_the_largest_errors_are_taken_that_fit(budget, names, nbytes):
    plan = chosen(LAYERS, budget)
    if budget == 128:  # only the smallest layer fits
        names = ("a",)
    assert plan.int8_modules == names
    assert plan.nbytes == nbytes
    assert [layer.name for layer in plan.layers] == ["b", "c", "a"]


def test_a_budget_below_four_bits_is_refused():
    with pytest.raises(ConfigError, match="take 120; give at least that"):
        chosen(LAYERS, 119)


def test_errors_are_those_of_each_layer_alone():
    model = tiny_model("llama", dtype=torch.float32, attn_implementation=attention_key())
    low = DataType("nf4", 32)
    ids = torch.randint(3, VOCABULARY, (40,))
    name, seen = "model.layers.1.mlp.down_proj", []
    layer = model.get_submodule(name)
    layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    by_output = {found.name: found.error for found in quant_plan(model, ids, budget_bytes=10**9, low=low).layers}
    assert seen[-1].shape[1] == len(ids)  # what came before tried how the model attends, and is not measured
    exact = seen[-1] @ layer.weight.t()
    error = seen[-1] @ (round_to(layer.weight.detach(), low)[0] - layer.weight).t()
    assert by_output[name] == pytest.approx(float(error.norm() / exact.norm()), rel=1e-4)
    by_weight = {found.name: found.error for found in quant_plan(model, budget_bytes=10**9, low=low).layers}
    assert by_weight.keys() == by_output.keys()
    assert all(0.05 < error < 0.2 for error in by_weight.values())  # NF4 on normal weights: 0.084 in blocks of 32
    assert not layer._forward_hooks or len(layer._forward_hooks) == 1  # only the test's own is left


def test_a_planned_model_is_loaded_in_two_types(tmp_path: Path):
    folder = save_model(tmp_path / "base")
    dense, _ = load(folder, quant="none", dtype=torch.float32)
    plan = quant_plan(dense, budget_bytes=10**9)
    wanted = plan.int8_modules[:3]
    model, _ = load(folder, quant="nf4", int8_modules=list(wanted), dtype=torch.float32)
    eight = {name for name, module in model.named_modules() if isinstance(module, Linear8bit)}
    four = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert eight == set(wanted)
    assert eight | four == {layer.name for layer in plan.layers}
    for name in wanted:
        assert torch.equal(
            model.get_submodule(name).dequantize(), Linear8bit.from_linear(dense.get_submodule(name)).dequantize()
        )
    assert torch.isfinite(model(input_ids=torch.arange(9)[None]).logits).all()
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")


def test_names_that_are_no_layers_are_refused(tmp_path: Path):
    folder = save_model(tmp_path / "base")
    with pytest.raises(ModelError, match=r"int8_modules: model\.layers\.7\.q_proj"):
        load(folder, quant="nf4", int8_modules=["model.layers.7.q_proj"])
