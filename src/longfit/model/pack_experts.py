"""Which stacked experts of a model are quantised, which are not and why, and how their bytes are named in files.

transformers says of a module of experts which parameters it has, which way round, and computes it by a function that is
chosen by name; a module that says so is packed, whatever its family. In a file an expert's bytes are no weights that
another program could take for dense ones, so they have a name of their own:

    ...experts.packed.gate_up_proj_rows         bytes ``[E, rows, row_bytes]``
    ...experts.packed.gate_up_proj_constants    what the rows of each expert share
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming

from longfit.compat.transformers import do_not_initialize
from longfit.compat.transformers_experts import choose_experts, experts_layout, register_experts
from longfit.layers.experts import PackedExperts, constants_of, packed_experts
from longfit.layers.experts_forward import NAME, experts_forward
from longfit.layers.quantized_linear import QuantizedLinear

NO_INTERFACE = "experts that {} multiplies by itself, not through transformers' experts interface"


def is_skipped(name: str, skip_modules: list[str]) -> bool:
    """Whether ``skip_modules`` names a module or parameter, in full or by its last parts."""
    return name in skip_modules or any(name.endswith(f".{skip}") for skip in skip_modules)


def skipped_experts(model: nn.Module, skip_modules: list[str], *, packed_here: bool = True) -> dict[str, str]:
    """Which stacked experts stay dense, and why: name of the parameter to reason.

    Args:
        packed_here: False for a checkpoint that is quantised already and has dense experts.
    """
    reasons = {}
    for path, module in model.named_modules():
        layout = experts_layout(module)
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if parameter.dim() != 3 or (layout is None and "expert" not in f"{type(module).__name__}{full}".lower()):
                continue
            if layout is None or name not in layout.weights:
                reasons[full] = NO_INTERFACE.format(type(module).__name__)
            elif not packed_here:
                reasons[full] = "dense in this checkpoint"
            elif is_skipped(path, skip_modules) or is_skipped(full, skip_modules):
                reasons[full] = "named in skip_modules"
            elif parameter.shape[-1] % 2:
                reasons[full] = f"rows of an odd number of weights ({parameter.shape[-1]})"
    return reasons


def packable_experts(model: nn.Module, skipped: dict[str, str]) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """The modules of experts whose parameters are all quantised: path, module, names."""
    for path, module in model.named_modules():
        layout = experts_layout(module)
        if layout is not None and not any(f"{path}.{name}" in skipped for name in layout.weights):
            yield path, module, layout.weights


def unpacked(model: nn.Module, skip_modules: list[str]) -> list[str]:
    """Modules of experts that are dense now and would be packed."""
    found = packable_experts(model, skipped_experts(model, skip_modules))
    return [path for path, module, _ in found if packed_experts(module) is None]


def pack(module: nn.Module, names: tuple[str, ...], placeholder: Callable[[nn.Linear], QuantizedLinear]) -> None:
    """Give a module of experts room for bytes in place of its weights, and let longfit compute it.

    Args:
        placeholder: the layer, without memory, that would stand for a linear layer of these sizes.
    """
    layout = experts_layout(module)
    assert layout is not None, "only modules that the interface serves are packed"
    formats = {}
    num_experts = 0
    for name in names:
        num_experts, rows, columns = getattr(module, name).shape
        formats[name] = placeholder(nn.Linear(columns, rows, bias=False, device="meta"))
    packed = PackedExperts(formats, num_experts, transposed=layout.transposed)
    for name in names:
        module.register_parameter(name, packed.placeholder(name))
    module.add_module("packed", packed)
    for tensor in (*(getattr(module, name) for name in names), packed):
        do_not_initialize(tensor)
    register_experts(NAME, experts_forward)


def compute_packed(model: nn.Module) -> None:
    """Choose longfit's function for the models' experts that are packed."""
    for module in model.modules():
        if packed_experts(module) is not None:
            choose_experts(module, NAME)


def store(module: nn.Module, full_name: str, weight: Tensor) -> dict[str, Tensor]:
    """Quantise a dense parameter of experts: its bytes and constants under their full names in the model."""
    path, _, name = full_name.rpartition(".")
    packed = packed_experts(module)
    assert packed is not None, "only packed experts are stored"
    rows, constants = packed.stored(name, weight)
    return {full_name: nn.Parameter(rows, requires_grad=False), f"{path}.packed.{constants_of(name)}": constants}


def compare(
    module: nn.Module,
    full_name: str,
    weight: Tensor,
    stored: Mapping[str, Tensor],
    add: Callable[[QuantizedLinear, Tensor], None],
) -> None:
    """Call ``add`` with each expert as it is stored and as it was.

    Args:
        stored: what `store` has made of the parameter.
    """
    path, _, name = full_name.rpartition(".")
    packed = packed_experts(module)
    assert packed is not None, "only packed experts are stored"
    rows, constants = stored[full_name], stored[f"{path}.packed.{constants_of(name)}"]
    for number, expert in enumerate(weight):
        add(packed.formats[name].sharing(rows.detach()[number], constants[number]), expert)


def packed_parameters(model: nn.Module) -> Iterator[tuple[str, PackedExperts, str, Tensor]]:
    """Every parameter of packed experts: full name, what is known of its bytes, its name there, its bytes."""
    for path, module in model.named_modules():
        packed = packed_experts(module)
        for name in packed.formats if packed is not None else ():
            assert packed is not None
            yield f"{path}.{name}", packed, name, getattr(module, name)


def file_names(model: nn.Module) -> dict[str, str]:
    """Names of packed experts' bytes: in the model -> in a file."""
    names = (full.rpartition(".") for full, *_ in packed_parameters(model))
    return {f"{path}.{name}": f"{path}.packed.{name}_rows" for path, _, name in names}


def renamings(model: nn.Module) -> list[WeightRenaming]:
    """Tell transformers under which names a file has the bytes of packed experts."""
    last_parts = {tuple(name.rsplit(".", 2)[-2:]) for name in file_names(model)}
    return [
        WeightRenaming(rf"{module}\.packed\.{name}_rows", rf"{module}.{name}") for module, name in sorted(last_parts)
    ]
