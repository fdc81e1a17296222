"""Whether what was written is the trained model: opened as anybody would and compared with what it should say.

What it should say comes another way than what was written: PEFT merges the trained model in memory, and each weight is
rounded as the format rounds it. Both hold the same numbers then, but for two things that are known:

- *Arithmetic.* ``n`` products follow one another, each off by the unit roundoff ``u`` of the dtype that computes. The
  errors add in quadrature and grow where norms divide, by no more than twice: logits of spread ``s`` are off by
  ``e = 2 u s sqrt(n)``, and a divergence is half of the square. Log-probabilities, below 32, are rounded to 2^-24.
- *Flips.* PEFT adds ``B A`` in another order, so a weight differs by ``(r + 2) u`` of itself before it is rounded,
  and where that crosses a boundary it ends one step ``h`` away. That happens to a share ``2 d / h`` of weights that
  differ by ``d``, and costs ``h^2`` each, against ``h^2 / 12`` for rounding every weight: a share
  ``24 (r + 2) u |w| / h`` of what the type itself drifts, times four because it is a matter of chance.

What differs by more is not the trained model, however well it talks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longfit.compat.transformers import tied_weights
from longfit.errors import ExportError
from longfit.evaluation.drift import Reference, drift_between, logit_spread
from longfit.exporting.trained import Trained
from longfit.layers.linear4bit import Linear4bit
from longfit.layers.quantized_linear import QuantizedLinear

Rounding = Callable[[str, Tensor], Tensor]
"""A merged weight by its name, as the format holds it, in float32."""

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
PRODUCTS_A_LAYER = 7  # of q, k, v, o, gate, up, down


@dataclass(frozen=True)
class Proof:
    """The divergence of what was written from what it should be, and the most that rounding explains; nats a token."""

    kl: float
    bound: float

    def require(self, what: str) -> None:
        """Raise ExportError if it is another model."""
        if not self.kl <= self.bound:
            raise ExportError(
                f"{what}: is not the trained model: read back, it is {self.kl:.2g} nats a token from what it should"
                f" hold, and rounding explains {self.bound:.2g} at most; nothing was left there. Take another format,"
                " and report this with the name of the base"
            )


def prove(
    found: Reference, expected: Reference, trained: Reference, *, num_layers: int, rank: int, levels: float
) -> Proof:
    """Compare what was written with what it should be.

    Args:
        found: what was written, as it was read back.
        expected: from `expected_model`.
        trained: the model as it was trained.
        num_layers: of the decoder.
        rank: the largest of the adapter.
        levels: steps of the type below the largest value of those that share them; 0 for a type that does not round.
    """
    unit = UNIT[found.hidden[0].dtype]
    error = 2 * unit * logit_spread(expected) * (PRODUCTS_A_LAYER * num_layers + 1) ** 0.5
    arithmetic = error**2 / 2 + 32 * 2.0**-24
    flips = min(1.0, 4 * 24 * (rank + 2) * unit * levels)
    own = drift_between("", expected, trained).kl
    return Proof(drift_between("", found, expected).kl, arithmetic + flips * own)


def expected_model(
    trained: Trained, onto: str, rounding: Rounding, *, untied: bool, device: torch.device, dtype: torch.dtype
) -> Any:
    """The trained model with its adapter merged by PEFT and every weight rounded as the format does.

    Args:
        onto: ``"4bit"``: the base as it was trained; ``"16bit"``: its originals.
        rounding: of the format.
        untied: whether a head that the base ties to its embeddings was trained apart.
    """
    if onto == "16bit":
        trained = replace(trained, quant="none", int8_modules=(), int8_threshold=None)
    model, _ = trained.load(device, dtype=dtype)
    if untied:
        _untie(model.get_base_model())
    for module in model.modules():
        if isinstance(module, Linear4bit):  # PEFT rounds what it merges to this dtype
            module.row_format = replace(module.row_format, dtype=dtype)
    merged = model.merge_and_unload()
    for name, module in list(merged.named_modules()):
        if isinstance(module, QuantizedLinear):  # got no adapter
            merged.set_submodule(name, _dense(module, dtype))
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.data = rounding(name, parameter.data).to(parameter.device, dtype)
    return merged.eval()


def _untie(model: Any) -> None:
    """Give the output head a weight of its own, so that merging into it leaves the embeddings alone."""
    head = model.get_output_embeddings()
    layer = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    assert tied_weights(model) and isinstance(layer, nn.Linear)  # noqa: PT018
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def _dense(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(layer.dequantize(torch.float32).to(dtype), requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return dense
