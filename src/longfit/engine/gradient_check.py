"""Is the swept gradient right, on this model and this batch? Compared with plain autograd, parameter by parameter.

The plain side shares as little as possible: the model's own forward without any checkpointing, with the attention it
has, its own whole logits and torch's cross-entropy. So the check also covers how the engine found the output matrix,
the last norm and the family's scaling of logits. Dropout is off on both sides, because the two draw in another order.

Take a short batch: the plain side holds everything, logits included.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfit.engine.loss.training_loss import shifted_labels, training_loss
from longfit.engine.model_state import preserve_state
from longfit.engine.offload.activations import ActivationOffload
from longfit.engine.sweep.install import enable_sweep
from longfit.engine.sweep.sweeper import SweepReport, sweeper_of
from longfit.numerics.labels import IGNORED

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative error that rounding in another order may cause, by the dtype of the hidden states.

Adding a few hundred terms in another order changes a float64 gradient by 1e-14; the norms and routers of transformers
work in float32, which leaves 1e-7 where it meets a rounding edge and is why a float64 model is best checked with few
layers. float32: about 1e-6 a layer through tens of layers, more where a gradient is a small difference. float16 and
bfloat16 round every activation (5e-4, 4e-3), and two equally good gradients of a deep layer differ by about twenty such
roundings; of a model that its attention has just made worse (shifted attention before training) by many more: check
that one in float32.
"""


@dataclass(frozen=True)
class GradientReport:
    """The outcome of a check.

    Attributes:
        errors: per trainable parameter, ``|swept - plain| / |plain|`` (Frobenius norm); 0 where both are zero.
        loss, plain_loss: of the engine and of plain autograd.
        tolerance: what the dtype allows; see ``TOLERANCES``.
        sweep: what was swept.
    """

    errors: dict[str, float]
    loss: float
    plain_loss: float
    tolerance: float
    sweep: SweepReport

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter with the largest error, and the error."""
        return max(self.errors.items(), key=lambda item: item[1])

    @property
    def ok(self) -> bool:
        """Whether the loss and every gradient agree within the tolerance."""
        loss_error = abs(self.loss - self.plain_loss) / max(abs(self.plain_loss), 1e-30)
        return loss_error <= self.tolerance and self.worst[1] <= self.tolerance


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
    Returns: errors per parameter.
    Raises: ValueError: nothing is trainable. ModelError: the model cannot be entered.
    """
    inputs: dict[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("no parameter of the model requires a gradient; add adapters first (longfit.add_adapters)")
    sweeper = sweeper_of(model)
    offload = offload or (None if sweeper is None else sweeper.offload)
    parameters = list(named.values())
    with _without_dropout(model), torch.enable_grad():
        plain_loss, dtype = _plain_loss(model, **inputs)
        plain = torch.autograd.grad(plain_loss, parameters, allow_unused=True)
        report = enable_sweep(model, tile=tile or max(1, inputs["input_ids"].shape[1] // 3), offload=offload)
        loss = training_loss(model, **inputs)
        swept = torch.autograd.grad(loss, parameters, allow_unused=True)
    errors = {name: _relative_error(a, b) for name, a, b in zip(named, swept, plain, strict=True)}
    return GradientReport(errors, loss.item(), plain_loss.item(), TOLERANCES[dtype], report)


def _plain_loss(
    model: nn.Module,
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_items: int | Tensor | None = None,
) -> tuple[Tensor, torch.dtype]:
    """The loss from whole logits, and the dtype the model works in."""
    out = model(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False)
    logits = out.logits.double()  # torch's own float32 cross-entropy over a vocabulary of 49k is off by 9e-6
    targets = shifted_labels(input_ids, labels, position_ids, attention_mask).flatten()
    total = F.cross_entropy(logits.flatten(0, 1), targets.to(logits.device), reduction="sum")
    return total / (num_items if num_items is not None else (targets != IGNORED).sum()), out.logits.dtype


def _relative_error(value: Tensor | None, reference: Tensor | None) -> float:
    if value is None or reference is None:
        present = value if reference is None else reference
        return 0.0 if present is None or not present.any() else float("inf")
    dtype = torch.promote_types(value.dtype, torch.float32)
    distance, size = (value.to(dtype) - reference.to(dtype)).norm().item(), reference.to(dtype).norm().item()
    return distance / size if size else (0.0 if not distance else float("inf"))


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
