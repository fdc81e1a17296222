"""Is the swept gradient right, on this model and this batch? Compared with plain autograd, parameter by parameter.

The plain side shares as little as possible: the model as transformers runs it on each document alone, its own
attention (``sdpa``, or ``eager`` where it has no other), no checkpointing, its own whole logits and torch's
cross-entropy. So the check also covers longfit's attention and mask, packing, and how the engine found the output
matrix, the last norm and the family's scaling of logits. Only shifted attention, which transformers does not have, is
longfit's on both sides. Dropout is off, because the two draw in another order.

A difference is judged by what rounding does to *this* model: the plain side runs once more with every product moved by
one rounding of its dtype, drawn at random, and shifted attention in its reference, which adds up in another order: on
scores of some hundreds that is ten times what rounding queries and keys does. Take a short batch: the plain side holds
everything, logits included.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfit.attention.visibility import document_starts
from longfit.compat.transformers import attention_of, supports_sdpa
from longfit.engine.hf_model import base_model
from longfit.engine.loss.training_loss import shifted_labels, training_loss
from longfit.engine.model_state import preserve_state
from longfit.engine.offload.activations import ActivationOffload
from longfit.engine.sweep.install import enable_sweep
from longfit.engine.sweep.sweeper import SweepReport, sweeper_of
from longfit.kernels.dispatch import use_backend
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.numerics.labels import IGNORED

ROUNDINGS = 10
"""Times what one rounding of each product changes. The engine adds up in another order, which is one rounding of each
sum or a few: 0.5 to 1.1 times, measured on nine tiny families in float32; 0.02 to 0.7 times in bfloat16."""

LEAST = ROUNDINGS * 2.0**-24
"""Relative difference that is always allowed: that of float32, in which norms, routers and eager softmaxes of
transformers work in a float64 model too."""


@dataclass(frozen=True)
class GradientReport:
    """The outcome of a check.

    Attributes:
        errors: per trainable parameter, ``|swept - plain|`` over the size of all gradients of its layer (Frobenius
            norms): a gradient that is small beside its layer's is a small difference of large numbers.
        tolerances: per trainable parameter, the error that rounding in another order may cause.
        loss, plain_loss: of the engine and of plain autograd.
        loss_tolerance: of their relative difference.
        sweep: what was swept.
        plain_attention: the attention of the plain side.
    """

    errors: dict[str, float]
    tolerances: dict[str, float]
    loss: float
    plain_loss: float
    loss_tolerance: float
    sweep: SweepReport
    plain_attention: str

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter with the largest error beside what is allowed, and the error."""
        name = max(self.errors, key=lambda name: self.errors[name] / self.tolerances[name])
        return name, self.errors[name]

    @property
    def ok(self) -> bool:
        """Whether the loss and every gradient agree within the tolerances."""
        return self._loss_error <= self.loss_tolerance and self.worst[1] <= self.tolerances[self.worst[0]]

    @property
    def _loss_error(self) -> float:
        return abs(self.loss - self.plain_loss) / max(abs(self.plain_loss), 1e-30)

    def __str__(self) -> str:
        """Say it in two lines."""
        name, error = self.worst
        return (
            f"{'equal' if self.ok else 'DIFFERENT'} to plain autograd with attention {self.plain_attention!r}: worst"
            f" gradient {name}, off by {error:.1e} of its layer's, {self.tolerances[name]:.1e} allowed; loss off by"
            f" {self._loss_error:.1e}, {self.loss_tolerance:.1e} allowed\n{self.sweep}"
        )


def check_gradients(
    model: nn.Module,
    batch: Mapping[str, Tensor] | Tensor,
    *,
    tile: int | None = None,
    offload: ActivationOffload | None = None,
) -> GradientReport:
    """Compare the engine's loss and gradients with plain autograd's; the model is left as it was, ``.grad`` included.

    Args:
        model: a transformers causal language model or a PeftModel around one, swept or not, with something to train.
        batch: ``input_ids`` ``[B, T]``, or a mapping with it and what else :func:`training_loss` takes.
        tile: tokens per tile; default: a third of the batch's, so that tiles meet.
        offload: where layer inputs wait; default: the offload in use, if the model is swept.
    Returns: errors per parameter. In bfloat16 only gross errors are beyond rounding; check a model in float32.
    Raises: ValueError: nothing is trainable. ModelError: the model cannot be entered.
    """
    inputs: dict[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("no parameter of the model requires a gradient; add adapters first (longfit.add_adapters)")
    sweeper = sweeper_of(model)
    offload = offload or (None if sweeper is None else sweeper.offload)
    parameters = list(named.values())

    def differentiated(loss: Tensor) -> tuple[float, dict[str, Tensor]]:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.item(), {name: g for name, g in zip(named, found, strict=True) if g is not None}

    with _without_dropout(model), torch.enable_grad():
        with _own_attention(model) as plain_attention:
            plain = differentiated(_plain_loss(model, **inputs))
            with _rounded_products(model), use_backend("reference", op="attention"):
                rounded = differentiated(_plain_loss(model, **inputs))
        report = enable_sweep(model, tile=tile or max(1, inputs["input_ids"].shape[1] // 3), offload=offload)
        swept = differentiated(training_loss(model, **inputs))
    sizes = _layer_sizes(plain[1])
    errors = {name: _distance(swept[1], plain[1], name) / sizes.get(_layer(name), 1e-30) for name in named}
    noise = _layer_noise(rounded[1], plain[1])
    tolerances = {name: max(LEAST, ROUNDINGS * noise.get(_layer(name), 0.0)) for name in named}
    loss_noise = abs(rounded[0] - plain[0]) / max(abs(plain[0]), 1e-30)
    loss_tolerance = max(LEAST, ROUNDINGS * loss_noise, max(tolerances.values()))
    return GradientReport(errors, tolerances, swept[0], plain[0], loss_tolerance, report, plain_attention)


def _layer(name: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number; else its own name."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name


def _layer_sizes(gradients: dict[str, Tensor]) -> dict[str, float]:
    """Norm of all gradients of each layer."""
    squares: dict[str, float] = {}
    for name, gradient in gradients.items():
        squares[_layer(name)] = squares.get(_layer(name), 0.0) + float(gradient.double().norm()) ** 2
    return {layer: max(square, 1e-60) ** 0.5 for layer, square in squares.items()}


def _layer_noise(rounded: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, float]:
    """What a rounding changed in each layer, over the size of its gradients."""
    moved = {name: rounded[name].double() - gradient.double() for name, gradient in plain.items()}
    sizes = _layer_sizes(plain)
    return {layer: size / sizes[layer] for layer, size in _layer_sizes(moved).items()}


def _distance(one: dict[str, Tensor], other: dict[str, Tensor], name: str) -> float:
    """Norm of the difference of two gradients; one that is missing is zero."""
    pair = [gradients[name].double() for gradients in (one, other) if name in gradients]
    return float((pair[0] - pair[1] if len(pair) == 2 else pair[0]).norm()) if pair else 0.0


@contextmanager
def _own_attention(model: nn.Module) -> Iterator[str]:
    """Run a model with an attention of transformers; shifted attention, which only longfit has, stays."""
    base = base_model(model)
    before = attention_of(base)
    if not before.startswith("longfit-shifted"):
        base.set_attn_implementation("sdpa" if supports_sdpa(base) else "eager")
    try:
        yield attention_of(base)
    finally:
        base.set_attn_implementation(before)


@contextmanager
def _rounded_products(model: nn.Module) -> Iterator[None]:
    """Move what every linear layer returns by one rounding of its dtype, at random."""
    draw = torch.Generator().manual_seed(0)

    def move(module: nn.Module, args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        noise = torch.randn(out.shape, generator=draw, dtype=torch.float64).mul_(torch.finfo(out.dtype).eps / 2)
        return (out * noise.add_(1).to(out.device, torch.promote_types(out.dtype, torch.float32))).to(out.dtype)

    linears = [module for module in model.modules() if isinstance(module, (nn.Linear, QuantizedLinear))]
    hooks = [module.register_forward_hook(move) for module in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _plain_loss(
    model: nn.Module,
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """The loss from whole logits, each document alone: some families of transformers mix those of one row."""
    targets = shifted_labels(input_ids, labels, position_ids, attention_mask)
    device, shape = input_ids.device, input_ids.shape
    starts = document_starts(*shape, position_ids=position_ids, attention_mask=attention_mask, device=device)
    positions = torch.arange(shape[1], device=device) if position_ids is None else position_ids
    positions = positions.expand(shape)
    takes = "position_ids" in inspect.signature(base_model(model).forward).parameters
    total = torch.zeros((), dtype=torch.float64, device=device)
    for row in range(shape[0]):
        bounds = [*starts[row].unique().tolist(), shape[1]]
        for start, end in pairwise(bounds):
            wanted = targets[row, start:end]
            if bool((wanted == IGNORED).all()):
                continue
            given = {"position_ids": positions[row : row + 1, start:end]} if takes else {}
            logits = model(input_ids=input_ids[row : row + 1, start:end], use_cache=False, **given).logits[0]
            # torch's own float32 cross-entropy over a vocabulary of 49k is off by 9e-6
            total = total + F.cross_entropy(logits.double(), wanted.to(logits.device), reduction="sum").to(device)
    return total / (num_items if num_items is not None else (targets != IGNORED).sum())


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Train mode without dropout and without checkpointing inside; afterwards everything as it was."""
    with preserve_state(model):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
            if "gradient_checkpointing" in vars(module):
                vars(module)["gradient_checkpointing"] = False
        yield
