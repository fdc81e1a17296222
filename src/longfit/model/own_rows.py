"""Load only the rows of quantised weights that one of several devices keeps: no device reads or holds the others'.

transformers reads no more of a tensor than a parameter's place says, if that is a DTensor cut along its rows; so the
places are made such, and what arrives here are the own rows of the dense weight. In 4 bits they are quantised by
themselves, as no block crosses a row. Only the double quantisation looks at all block constants of a weight (their
mean, and runs of 256 of them): these are gathered, a sixteenth of a byte a weight, and everybody quantises all of them.
So the bytes are those of a weight that was quantised as a whole.

Until the devices share the model's layers (``parallel/shard.py``), a layer is gathered while it runs.

Read whole, a tensor at a time, and cut then: checkpoints that are quantised already, GGUF files, weights whose blocks
cross their rows, and whatever stays dense.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.hooks import RemovableHandle

from longfit.compat.torch_distributed import local_part
from longfit.kernels.dispatch import quantize_4bit
from longfit.layers.linear4bit import Linear4bit
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.numerics.double_quant import quantize_absmax
from longfit.numerics.row_format import RowFormat


class OwnRows:
    """The rows that this device keeps of every quantised weight, and the layers that are gathered while they run."""

    def __init__(self, mesh: DeviceMesh) -> None:
        """Keep a part.

        Args:
            mesh: of the devices; those along its last axis share one copy of the weights, FSDP2's way.
        """
        self._mesh = mesh
        self._placements = (*[Replicate()] * (mesh.ndim - 1), Shard(0))
        self._handles: list[RemovableHandle] = []
        self._cut: dict[QuantizedLinear, Tensor] = {}  # the own rows of each layer

    def make_place(self, layer: QuantizedLinear) -> None:
        """Let a layer without values expect the own rows of its weight."""
        if _is_cut_by_rows(layer):
            layer.weight = _frozen(distribute_tensor(layer.weight.data, self._mesh, self._placements))

    def stored(self, layer: QuantizedLinear, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer holds of a dense weight, and the constants of the whole weight.

        Args:
            layer: whose place was made.
            weight: its own rows ``[n, I]``; call it in every process for the same layers in the same order.
        Returns: uint8 rows ``[n, row_bytes]`` and constants, bit-equal to a part of ``layer.stored`` of the whole.
        """
        if not isinstance(layer.weight, DTensor):
            return layer.stored(weight)
        num_rows = weight.shape[0]
        if not isinstance(layer, Linear4bit):  # a constant of its own in every row
            if not num_rows:
                return layer.weight.to_local().new_empty(0, layer.weight.shape[1], device=weight.device), _no_bytes(
                    weight
                )
            return layer.stored(weight)
        layer.row_format = form = replace(layer.row_format, dtype=weight.dtype)
        codes, absmax = _quantized(weight, form)
        if not form.double_quant:
            return torch.cat([codes, absmax.view(torch.uint8)], 1), _no_bytes(weight)
        double = quantize_absmax(self._whole(absmax, form.rows).view(-1), absmax_block_size=form.absmax_block_size)
        scales = self.cut(double.codes.view(form.rows, form.blocks_per_row))
        constants = torch.cat([double.absmax, double.offset.view(1)]).view(torch.uint8)
        return torch.cat([codes, scales], 1), constants

    def cut(self, rows: Tensor) -> Tensor:
        """The own rows of a tensor that everybody has."""
        part = distribute_tensor(rows, self._mesh, self._placements, src_data_rank=None)
        return local_part(part)

    def settle(self, model: nn.Module) -> None:
        """Cut what was read whole, and from now on gather each layer of a loaded model while it runs.

        Weights are plain tensors of the own rows meanwhile: who adds adapters would take a DTensor for a shard of
        another kind.
        """
        for layer in _quantized_layers(model):
            if _is_cut_by_rows(layer):
                whole = not isinstance(layer.weight, DTensor)
                rows = self.cut(layer.weight.data).clone() if whole else local_part(layer.weight.data)
                layer.weight = _frozen(rows)
                self._cut[layer] = rows
        for module in _runners(model):
            before = module.register_forward_pre_hook(self._enter)
            self._handles += [before, module.register_forward_hook(self._leave, always_call=True)]

    def release(self) -> None:
        """Gather no more, and leave the weights as DTensors to who will."""
        for handle in self._handles:
            handle.remove()
        for layer, rows in self._cut.items():
            layer.weight = _frozen(self._spread(rows, layer.out_features))
        self._handles.clear()
        self._cut.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnRows":
        """The same devices: a copied layer has the hooks of the first, and process groups cannot be copied."""
        return self

    def _enter(self, module: nn.Module, args: Any) -> None:
        for layer in _quantized_layers(module):
            if layer in self._cut:
                layer.weight = _frozen(self._whole(self._cut[layer], layer.out_features))

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        for layer in _quantized_layers(module):
            if layer in self._cut:
                layer.weight = _frozen(self._cut[layer])

    def _whole(self, own: Tensor, num_rows: int) -> Tensor:
        return self._spread(own, num_rows).full_tensor()

    def _spread(self, own: Tensor, num_rows: int) -> DTensor:
        shape = torch.Size((num_rows, own.shape[1]))
        return DTensor.from_local(
            own, self._mesh, self._placements, run_check=False, shape=shape, stride=(own.shape[1], 1)
        )


def _runners(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, and quantised layers outside of them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {id(part) for layer in layers for part in layer.modules()}
    return [*layers, *(layer for layer in _quantized_layers(model) if id(layer) not in inside)]


def _quantized_layers(module: nn.Module) -> list[QuantizedLinear]:
    return [part for part in module.modules() if isinstance(part, QuantizedLinear)]


def _is_cut_by_rows(layer: QuantizedLinear) -> bool:
    return layer.weight.shape[0] == layer.out_features


def _quantized(weight: Tensor, form: RowFormat) -> tuple[Tensor, Tensor]:
    """Codes ``[n, code_bytes]`` and absmax fp32 ``[n, blocks_per_row]`` of some rows."""
    num_rows = weight.shape[0]
    if not num_rows:
        codes = torch.empty(0, form.code_bytes, dtype=torch.uint8, device=weight.device)
        return codes, torch.empty(0, form.blocks_per_row, device=weight.device)
    packed, state = quantize_4bit(weight, quant_type=form.quant_type, block_size=form.block_size, double_quant=False)
    return packed.view(num_rows, -1), state.block_absmax().view(num_rows, -1)


def _no_bytes(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=like.device)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
