"""Every key of a checkpoint is accounted for: what is missing, left over, of another type or not finite is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model_folders import save_model
from torch import Tensor

from longfit.errors import ModelError
from longfit.model.load import load

UP = "model.layers.1.mlp.up_proj.weight"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("accounting") / "base")


def without(part: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        for name in [name for name in weights if part in name]:
            del weights[name]

    return change


def with_value(name: str, value: Tensor) -> Callable[[Weights], None]:
    return lambda weights: weights.__setitem__(name, value)


def with_element(name: str, value: float) -> Callable[[Weights], None]:
    return lambda weights: weights[name].view(-1).__setitem__(7, value)


CHANGES: dict[str, tuple[Callable[[Weights], None], str]] = {
    "no head": (without("lm_head"), "lacks lm_head.weight"),
    "no embedding": (without("embed_tokens"), "lacks model.embed_tokens.weight"),
    "no norm": (without("model.norm"), "lacks model.norm.weight"),
    "no last layer": (without("layers.1."), "says 2 layers, the weights have 1"),
    "no first layer": (without("layers.0."), "lacks model.layers.0.input_layernorm.weight.* and 6 more"),
    "no up_proj": (without(UP), f"lacks {UP}"),
    "a layer too many": (with_value("model.layers.2.mlp.up_proj.weight", torch.zeros(96, 64)), r"has model\.layers\.2"),
    "a bias too many": (with_value("model.layers.1.mlp.up_proj.bias", torch.zeros(96)), r"has model.*up_proj\.bias"),
    "integers": (with_value(UP, torch.zeros(96, 64, dtype=torch.int32)), f"{UP} holds I32"),
    "bytes": (with_value("model.norm.weight", torch.zeros(64, dtype=torch.uint8)), "norm.weight holds U8"),
    "another shape": (with_value(UP, torch.zeros(96, 60)), r"shape \[96, 60\], config.json describes \[96, 64\]"),
    "NaN": (with_element(UP, float("nan")), f"{UP} holds NaN or infinity"),
    "infinity": (with_element("model.norm.weight", float("-inf")), "norm.weight holds NaN or infinity"),
}


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_checkpoint_that_is_not_the_model_is_refused(base: Path, tmp_path: Path, what: str, quant: str) -> None:
    change, told = CHANGES[what]
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=told) as caught:
        load(folder, quant=quant)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_what_a_model_makes_itself_and_other_parts_may_be_there(base: Path, tmp_path: Path, quant: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    weights["model.vision_tower.patch.weight"] = torch.zeros(8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    changed, _ = load(folder, quant=quant)
    expected, _ = load(base, quant=quant)
    assert all(torch.equal(a, b) for a, b in zip(changed.parameters(), expected.parameters(), strict=True))


def test_a_packed_checkpoint_with_a_broken_constant_is_named(base: Path, tmp_path: Path) -> None:
    for double_quant in (True, False):
        model, tokenizer = load(base, double_quant=double_quant)
        folder = tmp_path / f"packed-{double_quant}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        load(folder)
        weights = load_file(folder / "model.safetensors")
        weights[f"{UP}.nested_absmax" if double_quant else f"{UP}.absmax"][0] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"{UP} holds NaN"):
            load(folder)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
def test_a_configuration_does_not_choose_kernels(base: Path, tmp_path: Path, key: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: "somebody/kernel"}))
    model, _ = load(folder)
    assert model.config._attn_implementation == "sdpa"
