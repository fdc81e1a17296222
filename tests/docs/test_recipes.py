"""Every recipe is a config that loads, and a plan that fits the machine it is named after."""

from pathlib import Path

import pytest
import torch
from tests.planning.configs import FOLDER

from longfit.config import load_config
from longfit.planning.plan import plan_shape
from longfit.planning.shapes import read_shape
from longfit.training.memory_check import plan_settings

RECIPES = Path(__file__).parents[2] / "recipes"
GIB = 2**30
MACHINES = {
    "laptop": ("SmolLM2-135M", "cpu", {"host": 4 * GIB}),
    "card-8gb": ("Llama-3.1-8B", "cuda", {"accelerator": int(7.6 * GIB), "host": 32 * GIB}),
    "card-24gb": ("Llama-3.1-8B", "cuda", {"accelerator": int(23.5 * GIB), "host": 64 * GIB}),
    "chats": ("Llama-3.1-8B", "cuda", {"accelerator": int(11.8 * GIB), "host": 16 * GIB}),
    "book": ("Llama-3.1-8B", "cuda", {"accelerator": int(23.5 * GIB), "host": 32 * GIB}),
}
"""Model, device and bytes by place: cards as their drivers report them."""


def test_every_recipe_is_tried() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(MACHINES)


@pytest.mark.parametrize("name", MACHINES)
def test_a_recipe_loads_and_fits(name: str) -> None:
    model, device, limits = MACHINES[name]
    flags = {"MODEL": ("model.name", str(FOLDER / f"{model}.json")), "DATA": ("data.path", "x")}
    config = load_config(RECIPES / f"{name}.yaml", flags=flags)
    shape = read_shape(config.model.name)
    settings = plan_settings(config, device=torch.device(device), native_context=shape.native_context)
    found = plan_shape(shape, settings, limits, name=model)
    assert found.fits, found.peaks
