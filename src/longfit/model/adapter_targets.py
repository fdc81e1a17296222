"""Which layers and which stacked experts get an adapter, by the names that PEFT takes.

PEFT reads the adapters of transformers 4, where every expert had linear layers of its own, and so gives some names
another meaning in a mixture of experts: ``gate_proj`` stands for the stacked experts, at twice the rank, and ``gate``
for the router. Here a name means the layer of that name; experts are asked for by ``experts``. Linear layers that
cannot have an adapter are left out and named in the report (``untargeted``): those outside the decoder, routers that
return more than a product, layers whose weight is read by another's kernel, and names that PEFT would take for others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longfit.compat.peft import lost_on_loading, names_of_experts, takes_adapter
from longfit.compat.torch import holds_values
from longfit.compat.transformers_experts import experts_layout
from longfit.engine.hf_model import base_model, decoder
from longfit.errors import ModelError
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model.weight_reads import weight_reads


def linear_targets(model: Any, targets: str | list[str]) -> str | list[str]:
    """What PEFT is told as ``target_modules``; ``excluded`` goes with it.

    Raises: ModelError: a name that matches no linear layer, or that PEFT takes for experts.
    """
    taken = names_of_experts(str(model.config.model_type))
    if isinstance(targets, list):
        there = {_last(name) for name, _ in _linears(model)}
        wrong = [target for target in targets if _last(target) in taken & there]
        if wrong:
            raise ModelError(
                f"targets {', '.join(wrong)}: in a {model.config.model_type} PEFT takes this name for the stacked "
                "experts or their router; for adapters on experts use experts=True, and leave the name out"
            )
        require_targets(model, targets)
        return targets
    if targets != "all-linear" or not taken:
        return targets
    return sorted({_last(name) for name in adaptable(model)})


def excluded(model: Any) -> list[str] | None:
    """What PEFT is told as ``exclude_modules``: last names where they are enough, else full ones."""
    left_out, kept = untargeted(model), {_last(name) for name in adaptable(model)}
    return sorted({name if _last(name) in kept else _last(name) for name in left_out}) or None


def untargeted(model: Any) -> dict[str, str]:
    """Linear layers without an adapter whatever is asked for, by name, and why; the output head is none of them."""
    family, inner = str(model.config.model_type), decoder(model)
    inside, taken, head = set(inner.modules()), names_of_experts(family), model.get_output_embeddings()
    reads, reasons = weight_reads(base_model(model)), {}
    for name, module in _linears(model):
        last = _last(name)
        if module is head:
            continue
        if module not in inside:
            reasons[name] = f"outside of the decoder ({type(inner).__name__}), which alone is trained"
        elif not _is_product(module):
            reasons[name] = f"a {type(module).__name__} computes more than a product"
        elif last in taken:
            reasons[name] = "PEFT takes its name for the experts of this family"
        elif not takes_adapter(model, last) or reads.past_adapter(name):
            reasons[name] = "its weight is read by other code, past an adapter"
    others = [name for name, module in _linears(model) if module is not head and name not in reasons]
    return reasons | dict.fromkeys(sorted(lost_on_loading(model, others)), "PEFT renames its adapter when it loads one")


def adaptable(model: Any) -> list[str]:
    """Names of the linear layers that all-linear means."""
    left_out, head = untargeted(model), model.get_output_embeddings()
    return [name for name, module in _linears(model) if name not in left_out and module is not head]


def _linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Linear layers by the names that they have without adapters."""
    layers = (nn.Linear, QuantizedLinear)
    found = [(name, module) for name, module in model.named_modules() if ".lora_" not in f".{name}"]
    return [(name.removesuffix(".base_layer"), module) for name, module in found if isinstance(module, layers)]


def _is_product(module: nn.Module) -> bool:
    """Whether a layer returns its product alone; tried where its class computes in a way of its own."""
    if isinstance(module, QuantizedLinear) or type(module).forward is nn.Linear.forward:
        return True
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    with torch.no_grad():
        given = torch.arange(2 * weight.shape[1], device=weight.device).view(2, -1).cos().to(weight.dtype)
        found = module(given)
        expected = nn.functional.linear(given, weight, bias)
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        if not holds_values(weight):
            return True
        return bool((found - expected).norm() <= torch.finfo(weight.dtype).eps * weight.shape[1] * expected.norm())


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def require_targets(model: nn.Module, targets: list[str]) -> None:
    """Raise ModelError naming the targets that match no linear layer that can have an adapter, and what there is."""
    names = {_last(name) for name in adaptable(model)}
    unknown = [target for target in targets if _last(target) not in names]
    if not unknown:
        return
    why = [reason for name, reason in untargeted(model).items() if _last(name) == _last(unknown[0])]
    problem = f"no adapter there, {why[0]}" if why else "no such linear layers"
    raise ModelError(f"targets {', '.join(unknown)}: {problem}; this model has {', '.join(sorted(names))}")


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
