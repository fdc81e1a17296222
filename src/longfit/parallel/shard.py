"""Weights shared between devices (FSDP2): each has some rows of every layer, and gathers a layer when its turn comes.

A 4-bit weight is one uint8 parameter with its block constants in its rows, so cutting rows cuts whole blocks, and one
gather brings codes, constants and adapters of a layer. ``fully_shard`` gathers around the layer's call, and the sweep
is inside it: a layer is gathered once forward and once backward, not once a tile.

What trains is sharded too, and its optimiser sees plain tensors: this device's rows (`Shards`). So any optimiser works,
and its state is the device's share. Two things stay whole on every device: buffers (the constants of the double
quantisation, 0.0002 bytes a weight), and norms that train in another dtype than the adapters of their layer, as FSDP2
reduces one dtype a group; the gradients of the latter are added up here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from longfit.parallel.device_layout import DeviceLayout


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model that are gathered one at a time."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def shard_model(module: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Let devices share the weights of a module.

    Args:
        module: whose forward is the loss; what is not in ``layers`` is gathered for the whole of its forward and
            backward. Parameters of which only the own rows were loaded (DTensors of this mesh) stay these rows.
        layers: gathered one at a time.
        mesh: from `mesh_of`; a layer at a time is on its device as a whole.
    """
    device = torch.device(mesh.device_type)
    own = _set_own_rows_aside(module)
    whole: list[nn.Parameter] = []
    layers = list(layers)
    for layer in layers:
        odd = _of_another_dtype(layer)
        whole += odd
        for parameter in odd:
            parameter.data = parameter.data.to(device)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=set(odd))
    fully_shard(module, mesh=mesh, ignored_params=set(whole))
    for layer, following in pairwise(layers):  # backward, FSDP2 does this by itself
        layer.set_modules_to_forward_prefetch([following])  # type: ignore[operator]  # an FSDPModule by now
    for owner, name, rows in own:  # FSDP2 takes them up when it first runs, as it does what a state dict assigns
        setattr(owner, name, _in_place_of(getattr(owner, name), rows))


def _set_own_rows_aside(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Put shapes in the place of DTensors, which FSDP2 would not cut; returns where, and the rows."""
    found = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for owner, name, parameter in found:
        shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        setattr(owner, name, nn.Parameter(shape, requires_grad=False))
    return [(owner, name, parameter.to_local()) for owner, name, parameter in found]


def _in_place_of(place: DTensor, rows: Tensor) -> nn.Parameter:
    filled = DTensor.from_local(
        rows, place.device_mesh, place.placements, run_check=False, shape=place.shape, stride=place.stride()
    )
    return nn.Parameter(filled, requires_grad=False)


def mesh_of(layout: DeviceLayout, device: torch.device) -> DeviceMesh:
    """The devices of a run; those along the last axis share one copy of the weights. Call it in every process."""
    if layout.shard == layout.devices:
        return init_device_mesh(device.type, (layout.devices,), mesh_dim_names=("shard",))
    sizes = (layout.devices // layout.shard, layout.shard)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))


def _of_another_dtype(layer: nn.Module) -> list[nn.Parameter]:
    """What trains in a layer but not in the dtype that most of its trained numbers have."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    numbers: dict[torch.dtype, int] = {}
    for parameter in trained:
        numbers[parameter.dtype] = numbers.get(parameter.dtype, 0) + parameter.numel()
    common = max(numbers, key=numbers.__getitem__, default=None)
    return [parameter for parameter in trained if parameter.dtype != common]


@dataclass(frozen=True)
class _Part:
    """A trained parameter and the tensor that the optimiser moves: the parameter itself, or the own rows of it."""

    parameter: Tensor
    local: Tensor


class Shards:
    """What trains, as one device has it: plain tensors for the optimiser, whole tensors for files."""

    def __init__(self, parameters: Iterable[Tensor], *, num_devices: int) -> None:
        """Take the trained parameters of a sharded model, in the order that the optimiser will have them in."""
        self._num_devices = num_devices
        self.parameters: list[Tensor] = list(parameters)
        self._parts = [_Part(p, nn.Parameter(local_rows(p)) if isinstance(p, DTensor) else p) for p in self.parameters]
        self._local = {id(part.parameter): part.local for part in self._parts}

    def local(self, parameter: Tensor) -> Tensor:
        """The tensor that the optimiser moves for a parameter of the model."""
        return self._local[id(parameter)]

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimiser's groups, of this device's tensors instead of the model's parameters."""
        return [{**group, "params": [self.local(parameter) for parameter in group["params"]]} for group in groups]

    def drop_gradients(self) -> None:
        """Begin a step."""
        for part in self._parts:
            part.parameter.grad = part.local.grad = None

    def collect_gradients(self) -> None:
        """Give the optimiser's tensors their gradients, after all backward passes of a step.

        FSDP2 averages over all devices. The gradients of what is whole are averaged here.
        """
        for part in self._parts:
            gradient = part.parameter.grad
            if isinstance(gradient, DTensor):
                part.local.grad = gradient.to_local()
            elif gradient is not None:
                dist.all_reduce(gradient)
                gradient /= self._num_devices

    def square_norm(self) -> float:
        """The square of the norm of all gradients, over all devices, in float64."""
        sharded = whole = 0.0
        shards = 1
        for part in self._parts:
            if part.local.grad is None:
                continue
            square = float(torch.linalg.vector_norm(part.local.grad, dtype=torch.float64)) ** 2
            if isinstance(part.parameter, DTensor):
                sharded, shards = sharded + square, _num_shards(part.parameter)
            else:
                whole += square
        total = torch.tensor(sharded, dtype=torch.float64, device=self._parts[0].local.device)
        dist.all_reduce(total)
        return float(total) / (self._num_devices // shards) + whole


def _num_shards(parameter: DTensor) -> int:
    return int(parameter.device_mesh.size(parameter.device_mesh.ndim - 1))


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor of all rows, from all devices; call it in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: Tensor) -> Tensor:
    """The part of a tensor that this device has, in its own memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(whole: Tensor, like: Tensor) -> Tensor:
    """This device's rows of a tensor that everyone has, cut as ``like``; all of it where that is not sharded."""
    if not isinstance(like, DTensor):
        return whole
    cut = distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return cut.to_local()


def whole_state(state_dict: Mapping[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """An optimiser's state with every tensor of a parameter's rows made whole; call it in every process.

    Args:
        state_dict: of the optimiser of ``Shards.local`` tensors.
        parameters: of the model, in the order of the optimiser's.
    """
    state = {}
    for number, fields in _with_what_others_have(state_dict["state"], parameters).items():
        parameter = parameters[number]
        state[number] = {name: _made_whole(value, parameter) for name, value in fields.items()}
    return {**state_dict, "state": state}


def _with_what_others_have(
    state: Mapping[int, Mapping[str, Any]], parameters: list[Tensor]
) -> dict[int, Mapping[str, Any]]:
    """Add, in the order of parameters, the state of those that this device has no row of: tensors without rows.

    A matrix of fewer rows than devices leaves some with nothing, and an optimiser keeps no state of nothing. But they
    must take part where the others make it whole.
    """
    described = {
        number: {name: value.dtype if _is_rows(value, parameters[number]) else value for name, value in fields.items()}
        for number, fields in state.items()
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, described)
    found: dict[int, Mapping[str, Any]] = {}
    for number, parameter in enumerate(parameters):
        others = next((of_device[number] for of_device in gathered if number in of_device), None)
        if number in state:
            found[number] = state[number]
        elif others is not None:
            rows = local_rows(parameter)
            found[number] = {
                name: rows.new_empty(rows.shape, dtype=value) if isinstance(value, torch.dtype) else value
                for name, value in others.items()
            }
    return found


def own_state(state_dict: Mapping[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """Undo `whole_state`, for whatever number of devices there is now."""
    state = {}
    for number, fields in state_dict["state"].items():
        parameter = parameters[number]
        if local_rows(parameter).numel() == 0:
            continue
        state[number] = {
            name: own_rows(value, parameter).clone() if _is_like(value, parameter) else value
            for name, value in fields.items()
        }
    return {**state_dict, "state": state}


def _is_rows(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == local_rows(parameter).shape


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape


def _made_whole(value: Any, parameter: Tensor) -> Any:
    if not isinstance(parameter, DTensor) or not _is_rows(value, parameter):
        return value
    spread = DTensor.from_local(
        value.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
        run_check=False,
    )
    return spread.full_tensor().cpu()
