"""Which linear layers only multiply: found by running a model without its weights, and watching who reads them.

A layer in few bits can answer ``layer(x)``, but not code that takes ``layer.weight`` itself: Mamba multiplies by its
transpose, an indexer asks for its dtype, a router hands it to ``F.linear``. Names do not tell, so some tokens run
through a copy of the model in which every linear layer returns zeros and notices each look at its weight from outside.
All other parameters stand in as one number, seen as their shape, so that the copy takes no memory, whatever the size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from longfit.compat.torch import unwatched
from longfit.compat.transformers_experts import experts_layout

PLAIN = (nn.Linear, Conv1D)
NUM_TOKENS = 3
WHERE_IT_LIES = "device"
"""What may be asked of a weight without reading it."""
READ = "its weight is read by other code than its own"


@dataclass
class WeightReads:
    """What a run saw.

    Attributes:
        read: names of linear layers whose weight other code takes.
        called: names of those that multiplied.
        plain: names of layers of a class of their own that multiplied as ``nn.Linear`` does.
        failed: why the run ended before its end; "" where it did not.
    """

    read: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    plain: set[str] = field(default_factory=set)
    failed: str = ""

    def past_adapter(self, name: str) -> bool:
        """Whether a layer never multiplies, its weight being taken by other code, so that an adapter would not act."""
        return name in self.read and name not in self.called


_FOUND: WeakKeyDictionary[nn.Module, WeightReads] = WeakKeyDictionary()
"""What was seen, by model: a cache of what a run would see again, which lives as long as the model."""


def weight_reads(model: nn.Module) -> WeightReads:
    """Run some tokens through a copy of a model whose linear layers do not multiply; the model is left as it is.

    Args:
        model: a transformers causal language model, on any device or none, quantised or not.
    """
    if model not in _FOUND:
        _FOUND[model] = _watch(model)
    return _FOUND[model]


def _watch(model: nn.Module) -> WeightReads:
    found = WeightReads()
    stand_ins = {id(t): _stand_in(t) for t in (*model.parameters(), *model.buffers())}
    with torch.device("cpu"), torch.no_grad():
        copied: Any = copy.deepcopy(model, stand_ins)
        for name, module in list(copied.named_modules()):
            if not isinstance(module, PLAIN):
                if experts_layout(module) is not None:
                    module.forward = _same_shape
                continue
            if type(module) in PLAIN or _multiplies_plainly(module):
                copied.set_submodule(name, _Watched(name.removesuffix(".base_layer"), module, found))
        for training in (False, True):  # a family may compute in another way, or rescale itself
            try:
                copied.train(training)(input_ids=torch.ones(1, NUM_TOKENS, dtype=torch.int64), use_cache=False)
            except Exception as error:  # what was read until then stands; the run itself will fail where this does
                found.failed = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return found


def _stand_in(tensor: Tensor) -> Tensor:
    """One number of a tensor's kind, on the CPU, seen as its shape."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    one = torch.ones((), dtype=dtype, device="cpu").expand(tensor.shape)
    return nn.Parameter(one, requires_grad=False) if isinstance(tensor, nn.Parameter) else one


def _same_shape(hidden: Tensor, *routes: Any, **more: Any) -> Tensor:
    return torch.zeros_like(hidden)


def _multiplies_plainly(module: Any) -> bool:
    """Whether a layer of a class that inherits from ``nn.Linear`` computes ``x W^T + b``; tried with small weights."""
    own = {"weight"} if module.bias is None else {"weight", "bias"}
    if {name for name, _ in (*module.named_parameters(), *module.named_buffers())} != own or [*module.children()]:
        return False
    draw = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=draw) for shape in ((5, 3), (5,), (2, 4, 3)))
    values = {name: nn.Parameter(value, requires_grad=False) for name, value in (("weight", weight), ("bias", bias))}
    small = copy.deepcopy(module, {id(module.get_parameter(name)): values[name] for name in own})
    try:
        found = [small.train(training)(x) for training in (False, True)]
    except Exception:
        return False
    expected = F.linear(x, weight, bias if "bias" in own else None)
    return all(isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected) for y in found)


class _Watched(nn.Module):
    """Stands for a linear layer: returns zeros, and notes who looks at its weight."""

    def __init__(self, name: str, layer: Any, found: WeightReads) -> None:
        super().__init__()
        if isinstance(layer, Conv1D):
            self.nx, self.nf = layer.nx, layer.nf
            self.in_features, self.out_features, self._shape = layer.nx, layer.nf, (layer.nx, layer.nf)
        else:
            self.in_features, self.out_features = layer.in_features, layer.out_features
            self._shape = (layer.out_features, layer.in_features)
        self.bias, self._name, self._found = layer.bias, name, found
        self._is_plain_class = type(layer) in PLAIN

    @property
    def weight(self) -> Tensor:
        seen: Any = torch.zeros(()).expand(self._shape).as_subclass(_Noticed)
        seen.note = lambda: self._found.read.add(self._name)
        weight: Tensor = seen
        return weight

    def forward(self, x: Tensor) -> Tensor:
        self._found.called.add(self._name)
        if not self._is_plain_class:
            self._found.plain.add(self._name)
        return x.new_zeros(*x.shape[:-1], self.out_features)


class _Noticed(Tensor):
    """A weight that tells when something is done with it."""

    note: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _of(func) != WHERE_IT_LIES:
            for each in args:
                if isinstance(each, _Noticed):
                    each.note()
        name = getattr(func, "__name__", "")
        if _of(func) == "data" or (name.endswith("_") and not name.endswith("__")):
            return args[0]  # what is written in place: one number cannot be written as many
        return unwatched(func, args, kwargs or {})


def _of(func: Any) -> str:
    """Name of the attribute that a getter gets; "" for other functions."""
    return str(getattr(getattr(func, "__self__", None), "__name__", ""))
