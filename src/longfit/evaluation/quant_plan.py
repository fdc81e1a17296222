"""Which layers deserve 8 bits: a mixed base within a byte budget, by the error each layer makes in 4 bits.

Layers are not equally sensitive. Each is measured in 4 bits, by what rounding does to its output on a text (or, without
a text, to its weights); those with the largest relative error get 8 bits with one constant a row, as far as the budget
goes. `load(int8_modules=...)` stores the model so.

It is a ranking layer by layer, blind to how errors add up on the way to the loss: ``quant_error`` shows what it brings.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longfit.engine.hf_model import base_model
from longfit.errors import ConfigError
from longfit.evaluation.evaluation_mode import measured
from longfit.evaluation.quant_error import DataType, quantizable_layers, round_to

EIGHT_BITS = DataType("int8_rows")


@dataclass(frozen=True)
class LayerError:
    """What a layer loses in 4 bits.

    Attributes:
        name: of the layer.
        error: root of the squared error over the root of the squares, of its outputs on the text, or of its weights.
        low_bytes, high_bytes: stored in 4 and in 8 bits.
    """

    name: str
    error: float
    low_bytes: int
    high_bytes: int


@dataclass(frozen=True)
class QuantPlan:
    """Which layers are stored in 8 bits.

    Attributes:
        int8_modules: their names, those with the largest error first.
        layers: every layer, the largest error first.
        nbytes: of all these layers together, as planned.
    """

    int8_modules: tuple[str, ...]
    layers: tuple[LayerError, ...]
    nbytes: int


def quant_plan(
    model: nn.Module,
    token_ids: Tensor | Sequence[Tensor] | None = None,
    *,
    budget_bytes: int,
    low: DataType | None = None,
) -> QuantPlan:
    """Give 8 bits to the layers that lose most in 4, within a budget.

    Args:
        model: a transformers causal language model in 16 or more bits.
        token_ids: text ``[T]`` to measure outputs on, or several; None measures weights.
        budget_bytes: for all quantised layers together.
        low: the 4-bit type of the others; default: NF4 in blocks of 64 with double quantisation.
    Raises: ConfigError: the budget is smaller than all layers in 4 bits. ModelError: the model is quantised already.
    """
    low = low or DataType("nf4", 64, double_quant=True)
    names = {id(module): name for name, module in base_model(model).named_modules()}
    layers = {names[id(layer)]: layer for layer in quantizable_layers(model)}
    rounded = {name: round_to(layer.weight.detach(), low) for name, layer in layers.items()}
    if token_ids is None:
        errors = {name: _relative(layer.weight, rounded[name][0]) for name, layer in layers.items()}
    else:
        errors = output_errors(model, layers, {name: pair[0] for name, pair in rounded.items()}, token_ids)
    found = [
        LayerError(name, errors[name], rounded[name][1], round_to(layer.weight.detach(), EIGHT_BITS)[1])
        for name, layer in layers.items()
    ]
    return chosen(found, budget_bytes)


def chosen(layers: Sequence[LayerError], budget_bytes: int) -> QuantPlan:
    """Take the layers with the largest error while the budget holds them; a small one may fit where a large does not.

    Raises: ConfigError: the budget is smaller than all layers in 4 bits.
    """
    total = sum(layer.low_bytes for layer in layers)
    if budget_bytes < total:
        raise ConfigError(f"budget of {budget_bytes:,} bytes: all layers in 4 bits take {total:,}; give at least that")
    ranked = sorted(layers, key=lambda layer: layer.error, reverse=True)
    taken = []
    for layer in ranked:
        if total + layer.high_bytes - layer.low_bytes <= budget_bytes:
            total += layer.high_bytes - layer.low_bytes
            taken.append(layer.name)
    return QuantPlan(tuple(taken), tuple(ranked), total)


def output_errors(
    model: nn.Module,
    layers: dict[str, nn.Linear],
    rounded: dict[str, Tensor],
    token_ids: Tensor | Sequence[Tensor],
) -> dict[str, float]:
    """The relative error of each layer's output on a text, each layer alone: its inputs are the exact ones."""
    squares = dict.fromkeys(layers, 0.0)
    squared_errors = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            exact = x @ module.weight.t()
            squares[name] += float(exact.square().sum(dtype=torch.float64))
            squared_errors[name] += float((x @ rounded[name].t() - exact).square().sum(dtype=torch.float64))

        return hook

    documents = [token_ids] if isinstance(token_ids, Tensor) else token_ids
    with measured(model), hooks(layers, watch):  # in this order: choosing an attention runs the model
        for ids in documents:
            base_model(model)(input_ids=ids[None].to(base_model(model).device), use_cache=False, logits_to_keep=1)
    return {name: (squared_errors[name] / squares[name]) ** 0.5 if squares[name] else 0.0 for name in layers}


@contextmanager
def hooks(layers: dict[str, nn.Linear], watch: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    """Have each layer's forward watched inside the block."""
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _relative(weight: Tensor, rounded: Tensor) -> float:
    exact = weight.detach().float()
    return float((rounded.float() - exact).norm() / exact.norm().clamp(min=1e-38))
