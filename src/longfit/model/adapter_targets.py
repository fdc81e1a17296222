"""Which layers and which stacked experts get an adapter, by the names that PEFT takes.

PEFT reads the adapters of transformers 4, where every expert had linear layers of its own, and so gives some names
another meaning in a mixture of experts: ``gate_proj`` stands for the stacked experts, at twice the rank, and ``gate``
for the router. Here a name means the layer of that name; experts are asked for by ``experts``, and layers whose names
PEFT would take for experts get no adapter and are named in the report.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from longfit.compat.peft import names_of_experts
from longfit.compat.transformers_experts import experts_layout
from longfit.errors import ModelError


def linear_targets(model: Any, targets: str | list[str]) -> str | list[str]:
    """What PEFT is told as ``target_modules``.

    Raises: ModelError: a name that matches no linear layer, or that PEFT takes for experts.
    """
    taken = names_of_experts(str(model.config.model_type))
    if isinstance(targets, list):
        require_targets(model, targets)
        wrong = [target for target in targets if target.rsplit(".", 1)[-1] in taken]
        if wrong:
            raise ModelError(
                f"targets {', '.join(wrong)}: in a {model.config.model_type} PEFT takes this name for the stacked "
                "experts or their router; for adapters on experts use experts=True, and leave the name out"
            )
        return targets
    if targets != "all-linear" or not taken:
        return targets
    head = model.get_output_embeddings()
    linears = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return sorted(linears - taken)


def untargeted(model: nn.Module, model_type: str) -> tuple[str, ...]:
    """Linear layers without an adapter because PEFT would take their names for experts."""
    taken = names_of_experts(model_type)
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in taken
    )


def require_targets(model: nn.Module, targets: list[str]) -> None:
    """Raise ModelError naming the targets that match no linear layer, and what there is."""
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = [target for target in targets if target.rsplit(".", 1)[-1] not in names]
    if unknown:
        raise ModelError(
            f"targets {', '.join(unknown)}: no such linear layers; this model has {', '.join(sorted(names))}"
        )


def expert_targets(model: nn.Module, *, dropout: float) -> list[str]:
    """Names of the stacked experts' parameters, as PEFT's ``target_parameters`` takes them: their last two parts.

    Raises: ModelError: there are none that transformers' experts interface serves, or ``dropout``, which PEFT does not
        apply to parameters.
    """
    if dropout:
        raise ModelError(f"experts with dropout={dropout:g}: adapters on experts have none; use dropout 0")
    found = set()
    for path, module in model.named_modules():
        layout = experts_layout(module)
        if layout is not None:
            found |= {f"{path.rsplit('.', 1)[-1]}.{name}" for name in layout.weights}
    if not found:
        raise ModelError("experts: this model has no stacked experts; leave it out")
    return sorted(found)
