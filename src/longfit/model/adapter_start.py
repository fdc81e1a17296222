"""Where adapters begin on a quantised base: at nothing, or at the low-rank part of what rounding lost (LoftQ).

LoftQ needs the dense weight beside its codes, and both are there at one moment only: while a model is loaded, tensor by
tensor. So the split is made then, of one weight at a time, and its two factors wait at their layer until `add_adapters`
takes them.

The base keeps the bytes that it has without a start: dq(q(W)), as any bitsandbytes checkpoint of the model holds it.
The nearest start beside them is the nearest matrix of rank R to W - dq(q(W)), which is LoftQ with one iteration, and
what PEFT's ``replace_lora_weights_loftq`` does. So a start is nothing but other first values of A and B: adapter files
are plain LoRA files of the same base, and merging, exporting, warm starts and resuming know nothing of it. More
iterations, or QPiSSA, would quantise another matrix than W; such a base is in no file that an adapter could name.

Of the error that rounding makes in a weight of Gaussian numbers [576, 1536] rank 16 repairs 3.4 %: what is lost is
nearly white. It repairs more where a weight's rows or columns differ in scale.

Source: Li et al. "LoftQ", 2023, algorithm 1 with T = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longfit.engine.hf_model import base_model
from longfit.errors import ModelError
from longfit.layers.experts import packed_experts
from longfit.layers.qlora import QLoRALinear
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.numerics.low_rank import leading

STARTS = ("standard", "loftq")


@dataclass(frozen=True)
class FirstValues:
    """What an adapter begins with, and what it repairs.

    Attributes:
        A, B: ``[R, I]`` and ``[O, R]``, fp32; the scaling of the adapter is not yet taken out.
        lost, left: squared error of the weight without and with them; ``squares``: of the weight itself.
    """

    A: Tensor
    B: Tensor
    lost: float
    left: float
    squares: float


@dataclass(frozen=True)
class StartReport:
    """What the adapters begin with.

    Attributes:
        num_layers: that begin at a low-rank part; all others begin at nothing.
        lost, left: relative error of their weights without and with it.
    """

    num_layers: int
    lost: float
    left: float

    def __str__(self) -> str:
        """Say it in a line."""
        return (
            f"adapters of {self.num_layers} layers begin with what rounding lost (LoftQ): relative error of the "
            f"weights {self.lost:.4f}, with the adapter {self.left:.4f}"
        )


def require_start(start: str, *, quant: str) -> None:
    """Raise ModelError for an unknown start, or one of a base that loses nothing."""
    if start not in STARTS:
        raise ModelError(f"start={start!r}: must be one of {', '.join(STARTS)}")
    if start != "standard" and quant == "none":
        raise ModelError(f"start={start!r} with quant='none': nothing is rounded, so there is nothing to begin with")


def keep_first_values(layer: QuantizedLinear, weight: Tensor, rows: Tensor, constants: Tensor, *, rank: int) -> None:
    """Leave at a layer what its adapter will begin with.

    Args:
        weight: dense ``[O, I]``.
        rows, constants: what the layer stores of it.
        rank: R; a weight with a smaller side takes that.
    """
    exact = weight.float()
    lost = exact - layer.sharing(rows, constants).dequantize(torch.float32)
    A, B = leading(lost, min(rank, *lost.shape))
    layer.__dict__["first_values"] = FirstValues(
        A, B, lost=_squares(lost), left=_squares(lost.addmm_(B, A, alpha=-1)), squares=_squares(exact)
    )


def begin(model: Any) -> StartReport | None:
    """Set new adapters to what waits at their layers; nothing waits any more afterwards.

    Returns: what was set; None if nothing waited.
    Raises: ModelError: the adapters have another rank than what waits.
    """
    used = []
    for name, layer in base_model(model).named_modules():
        if isinstance(layer, QLoRALinear) and (first := _taken(layer.packed_base())) is not None:
            _set(name, layer, first)
            used.append(first)
    for layer in base_model(model).modules():
        if isinstance(layer, QuantizedLinear):
            _taken(layer)  # layers without an adapter
    if not used:
        return None
    squares = sum(first.squares for first in used) or 1.0
    lost, left = (sum(getattr(first, name) for first in used) for name in ("lost", "left"))
    return StartReport(len(used), (lost / squares) ** 0.5, (left / squares) ** 0.5)


def require_no_experts(model: nn.Module) -> None:
    """Raise ModelError if adapters on experts are to begin at nothing where those of layers begin at a repair."""
    waits = any("first_values" in layer.__dict__ for layer in model.modules())
    if waits and any(packed_experts(module) is not None for module in model.modules()):
        raise ModelError("experts with start='loftq': only linear layers begin so; leave out experts or the start")


def _set(name: str, layer: QLoRALinear, first: FirstValues) -> None:
    A, B, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    rank = len(first.A)
    if rank != min(A.shape[0], *first.A.shape[1:], len(first.B)):
        raise ModelError(
            f"{name}: loaded with a start of rank {rank}, the adapter has rank {A.shape[0]}; give both the same rank"
        )
    root = scaling**0.5
    with torch.no_grad():
        A[:rank].copy_(first.A / root)
        B.zero_()
        B[:, :rank].copy_(first.B / root)


def _taken(layer: nn.Module) -> FirstValues | None:
    first: FirstValues | None = layer.__dict__.pop("first_values", None)
    return first


def _squares(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
