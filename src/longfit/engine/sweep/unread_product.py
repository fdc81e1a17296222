"""The product at a layer's end, whose value nothing in its backward reads, and which is therefore not computed again.

A decoder layer ends with ``residual + down(product)``. When it is computed again to be differentiated, its output is of
no use: an addition passes its gradient on without a look at what was added, and a linear layer's gradient needs its
input, not its output. So the last product, a quarter of a layer's, is left out of the recomputation.

Whether a layer ends like that is read from the graph of its first recomputation: the output must be an addition, and a
term of it an adapted linear layer that leads nowhere else. A norm, a scale or a dropout behind it ends the matter, and
so does a hook, which might look. The graph is read again whenever a product was left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from longfit.compat.torch import autograd_function_of, is_hooked
from longfit.errors import ModelError
from longfit.layers.qlora import QLoRALinear, QLoRAMatmul


class UnreadProducts:
    """Of each layer of a model the linear layer whose product its backward does not read, as far as known."""

    def __init__(self) -> None:
        self._known: dict[nn.Module, QLoRALinear | None] = {}

    def of(self, layer: nn.Module) -> QLoRALinear | None:
        """The linear layer of a layer, as far as known."""
        return self._known.get(layer)

    @contextmanager
    def left_out(self, layer: nn.Module) -> Iterator["LayerRun"]:
        """Leave the product out of what the layer computes while this lasts; ``check`` the output at the end."""
        module = self._known.get(layer)
        if module is None or "forward" in vars(module) or any(map(is_hooked, _around(layer, module))):
            yield LayerRun(self, layer, None)
            return
        run = LayerRun(self, layer, module)
        module.forward = run.forward  # type: ignore[method-assign]
        try:
            yield run
        finally:
            del module.forward

    def learn(self, layer: nn.Module, out: Tensor) -> QLoRALinear | None:
        """Read a layer's graph from its output; returns what is known of the layer from now on."""
        self._known[layer] = found = unread_product(out, layer)
        return found


class LayerRun:
    """One computation of a layer."""

    def __init__(self, products: UnreadProducts, layer: nn.Module, module: QLoRALinear | None) -> None:
        self._products, self._layer, self._module = products, layer, module
        self._left_out = False

    def forward(self, x: Tensor) -> Tensor:
        """Stand in for the forward of the linear layer."""
        assert self._module is not None
        y = self._module.forward_known(x, None)
        self._left_out = y is not None
        return type(self._module).forward(self._module, x) if y is None else y

    def check(self, out: Tensor) -> None:
        """Read the graph of the layer's output.

        Raises: ModelError: a product was left out that the graph reads.
        """
        found = self._products.learn(self._layer, out)
        if self._left_out and found is not self._module:
            raise ModelError(
                f"{type(self._layer).__name__} computes something else than at its last step, after the sweep has seen"
                " it; call enable_sweep(model) again when a layer's code or settings have changed"
            )


def unread_product(out: Tensor, layer: nn.Module) -> QLoRALinear | None:
    """Return the linear layer whose output is added to give ``out`` and read by nothing else; None where there is none.

    In float16 there is none: families look at their hidden states for infinities there.
    """
    end = out.grad_fn
    if end is None or end.name() != "AddBackward0" or out.dtype == torch.float16:
        return None
    terms = [node for node, _ in end.next_functions if node is not None]
    adapters = {module.lora_A: module for module in layer.modules() if isinstance(module, QLoRALinear)}
    for term in terms:
        if autograd_function_of(term) is not QLoRAMatmul:
            continue
        others = list(terms)
        others.remove(term)
        if term in _behind(others):
            continue
        A = term.saved_tensors[2]  # type: ignore[attr-defined]
        return next((module for As, module in adapters.items() if any(A is p for p in As.parameters())), None)
    return None


def _behind(nodes: list[Any]) -> set[Any]:
    """All nodes of the graph that these lead to, themselves included."""
    seen: set[Any] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [further for further, _ in node.next_functions if further is not None]
    return seen


def _around(layer: nn.Module, module: nn.Module) -> Iterator[nn.Module]:
    """The modules of the layer that a module is inside of, from the layer itself inwards, and the module."""
    modules = dict(layer.named_modules())
    name = next(name for name, found in modules.items() if found is module)
    yield layer
    for end, character in enumerate(name + "."):
        if character == ".":
            yield modules[name[:end]]
