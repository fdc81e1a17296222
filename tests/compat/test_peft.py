"""What longfit takes for granted of PEFT beyond its public names; each test says what breaks when it is red."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from tests.families.tiny_family import tiny_family
from torch import nn

from longfit.compat import TESTED
from longfit.compat import peft as compat


class Own(nn.Linear):
    pass


class OwnAdapter(LoraLinear):
    pass


def test_a_layer_of_ones_own_gets_its_own_adapter() -> None:
    """Else adapters on 4-bit layers are PEFT's, which copy the base output and run in float32."""
    config = LoraConfig(r=2, target_modules=["0", "1"])
    compat.register_adapter_layer(config, Own, OwnAdapter)
    model = get_peft_model(nn.Sequential(Own(4, 4), nn.Linear(4, 4)), config)
    adapted = [type(module) for module in model.modules() if isinstance(module, LoraLinear)]
    assert adapted == [OwnAdapter, LoraLinear]
    assert model(torch.ones(1, 4)).shape == (1, 4)


def test_the_files_do_not_carry_it(tmp_path: Path) -> None:
    """Else an adapter could not be loaded without longfit."""
    config = LoraConfig(r=2, target_modules=["0"])
    compat.register_adapter_layer(config, Own, OwnAdapter)
    get_peft_model(nn.Sequential(Own(4, 4)), config).save_pretrained(tmp_path)
    assert "Own" not in (tmp_path / "adapter_config.json").read_text()


def test_names_that_peft_takes_for_experts() -> None:
    """Else "all-linear" puts adapters of twice the rank on every expert and on the routers of these families."""
    assert {"gate_proj", "up_proj", "down_proj", "gate"} <= compat.names_of_experts("qwen3_moe")
    assert {"w1", "w2", "w3", "gate"} <= compat.names_of_experts("mixtral")
    assert not compat.names_of_experts("llama")


def test_layers_that_peft_puts_no_adapter_on() -> None:
    assert not compat.takes_adapter(tiny_family("mamba").model, "out_proj")
    assert compat.takes_adapter(tiny_family("mamba").model, "in_proj")
    assert compat.takes_adapter(tiny_family("llama").model, "out_proj")


def test_adapters_that_peft_loads_under_another_name() -> None:
    """Laguna's shared experts: a renaming meant for checkpoints changes a name that is right."""
    names = ["model.layers.1.mlp.shared_experts.up_proj", "model.layers.1.self_attn.q_proj"]
    assert compat.lost_on_loading(tiny_family("laguna").model, names) == set(names[:1])
    assert compat.lost_on_loading(tiny_family("llama").model, names) == set()


@pytest.mark.parametrize("package", TESTED)
def test_the_tested_versions_are_the_pinned_ones(package: str) -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().split()
    assert f"{package}=={TESTED[package]}" in pins
