"""What longfit takes for granted of transformers' experts interface; each test says what breaks when it is red."""

import pytest
import torch
from tests.moe_models import FAMILIES, mixture
from torch import nn

from longfit.compat import transformers_experts as compat


def experts_of(model: nn.Module) -> nn.Module:
    """The experts of a model's last layer."""
    return [module for module in model.modules() if compat.experts_layout(module)][-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_says_how_its_experts_compute(family: str) -> None:
    """Else experts stay in 16 bits."""
    experts = experts_of(mixture(family))
    layout = compat.experts_layout(experts)
    assert layout is not None
    assert all(getattr(experts, name).dim() == 3 for name in layout.weights)
    assert layout.transposed == layout.biased == (family == "gpt_oss")
    assert layout.gated == (family != "nemotron_h")


def test_other_modules_say_nothing() -> None:
    """Else a linear layer is taken for experts."""
    assert compat.experts_layout(nn.Linear(2, 2)) is None


def test_a_registered_function_computes_the_experts() -> None:
    """Else packed bytes are multiplied as if they were weights."""
    model, calls = mixture("mixtral"), []

    def function(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        calls.append((module, args))
        return compat.dense_experts_forward(module, *args)

    expected = model(input_ids=torch.arange(7)[None]).logits
    compat.register_experts("test-function", function)
    compat.choose_experts(experts_of(model), "test-function")
    assert torch.equal(model(input_ids=torch.arange(7)[None]).logits, expected)
    assert [module for module, _ in calls] == [layer.mlp.experts for layer in model.model.layers]
    hidden, index, weights = calls[0][1]
    assert hidden.shape == (7, 48)
    assert index.shape == weights.shape == (7, 2)


def test_dense_experts_have_a_way_in_float64() -> None:
    """Else a model whose experts were merged cannot be checked in float64."""
    model = mixture("gpt_oss").double()
    model.set_experts_implementation("eager")
    expected = model(input_ids=torch.arange(7)[None]).logits
    compat.register_experts("test-dense", compat.dense_experts_forward)
    compat.choose_experts(experts_of(model), "test-dense")
    assert torch.equal(model(input_ids=torch.arange(7)[None]).logits, expected)
