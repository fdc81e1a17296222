"""A layer's tensors become rows while they are loaded: what is refused, and what rounding is said to have changed."""

import pytest
import torch

from longfit.errors import ModelError
from longfit.layers.linear4bit import Linear4bit
from longfit.model.quantize_on_load import AddedError, from_bitsandbytes_int8


def test_codes_in_the_order_of_one_card_are_refused() -> None:
    tensors = {"weight": torch.zeros(2, 4, dtype=torch.int8), "SCB": torch.ones(2), "weight_format": torch.tensor(2)}
    with pytest.raises(ModelError, match="layout 2"):
        from_bitsandbytes_int8("layers.0.q_proj.weight", tensors)


def test_the_error_of_all_weights_is_the_share_of_their_squares() -> None:
    """Two layers, one of which loses everything: as much as all that is stored of both, and nothing before."""
    torch.manual_seed(0)
    added, weights = AddedError(), [torch.randn(8, 64) for _ in range(2)]
    assert added.relative() is None
    lost = kept = 0.0
    for weight in weights:
        layer = Linear4bit.from_linear(_linear(weight))
        added.add(layer, weight)
        lost += float((layer.dequantize(torch.float32) - weight).double().square().sum())
        kept += float(weight.double().square().sum())
    assert added.relative() == pytest.approx((lost / kept) ** 0.5, rel=1e-6)


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear
