"""Results of a layer's linear layers saved from forward to backward, as far as a byte budget goes.

A swept layer is multiplied through twice: forward, and again for its gradient. Where memory is left over, the results
can wait instead: a number of 4 bytes spares two operations for each input of its row, whichever matrix it comes from,
so they are saved as they come, first layers first, until the budget is used up. Nothing is saved unless it is asked
for (``engine.saved_products``): attention outputs (``saved_attention.py``) spare more for their bytes, and on long
contexts the budget covers little. The bits are the same either way.

Saved are the results of adapted linear layers, but for one that backward does not read (``unread_product.py``). On a
CPU the result itself waits: beside a copy of each, a step of SmolLM2-135M on 2,048 tokens peaked at 2.64 instead of
3.13 GB in float32, and took a twentieth less. What a layer writes over in between is multiplied again.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from weakref import WeakSet

from torch import Tensor, nn

from longfit.compat.torch import version_of
from longfit.layers.qlora import QLoRALinear


@dataclass(frozen=True)
class _Product:
    """A result as it was, or what is left of it."""

    y: Tensor
    version: int

    @classmethod
    def of(cls, y: Tensor) -> "_Product":
        """Keep a result; a copy where kernels of other libraries write over it unseen (liger's rotary embedding)."""
        kept = y if y.device.type == "cpu" else y.clone()
        return cls(kept, version_of(kept))

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody has written over it."""
        return version_of(self.y) == self.version


class SavedProducts:
    """What is saved of one pass over a layer; gone with the graph."""

    def __init__(self, budget: "SavedProductsBudget") -> None:
        self._budget = budget
        self._saved: dict[tuple[int, nn.Module], list[_Product]] = defaultdict(list)  # of a tile, in the order of calls
        self.num_bytes = 0

    @contextmanager
    def saving(self, layer: nn.Module, tile: int, *, but: nn.Module | None) -> Iterator[None]:
        """Save what the linear layers of a layer give while this lasts, except those of ``but``."""
        modules = [] if self._budget.left == 0 else [module for module in _free(layer) if module is not but]
        with _forwards(modules, partial(self._save, tile)):
            yield

    @contextmanager
    def known(self, layer: nn.Module, tile: int) -> Iterator[None]:
        """Let the linear layers of a layer give what was saved while this lasts, and forget it."""
        modules = [module for module in _free(layer) if (tile, module) in self._saved] if self._saved else []
        try:
            with _forwards(modules, partial(self._take, tile)):
                yield
        finally:
            for module in modules:
                self._forget(self._saved.pop((tile, module)))

    def _save(self, tile: int, module: QLoRALinear, x: Tensor) -> Tensor:
        y = QLoRALinear.forward(module, x)
        if y.nbytes <= self._budget.left:
            self._saved[tile, module].append(_Product.of(y))
            self.num_bytes += y.nbytes
        return y

    def _take(self, tile: int, module: QLoRALinear, x: Tensor) -> Tensor:
        waiting = self._saved[tile, module]
        if not waiting:
            return QLoRALinear.forward(module, x)
        known = waiting.pop(0)
        self._forget([known])
        y = module.forward_known(x, known.y) if known.is_unchanged else None
        return QLoRALinear.forward(module, x) if y is None else y

    def _forget(self, products: list[_Product]) -> None:
        self.num_bytes -= sum(product.y.nbytes for product in products)


class SavedProductsBudget:
    """The bytes that all layers share. A layer whose graph was dropped without a backward pays no longer."""

    def __init__(self, num_bytes: int) -> None:
        """Allow ``num_bytes``; 0 saves nothing."""
        self.num_bytes = num_bytes
        self._layers: WeakSet[SavedProducts] = WeakSet()

    def open(self) -> SavedProducts:
        """Begin a layer's forward pass."""
        layer = SavedProducts(self)
        self._layers.add(layer)
        return layer

    @property
    def left(self) -> int:
        """Bytes that are free."""
        return self.num_bytes - sum(layer.num_bytes for layer in self._layers)


def _free(layer: nn.Module) -> list[QLoRALinear]:
    """The adapted linear layers whose forward nobody has replaced."""
    modules = (module for module in layer.modules() if type(module) is QLoRALinear)
    return [module for module in modules if "forward" not in vars(module)]


@contextmanager
def _forwards(modules: list[QLoRALinear], forward: Callable[[QLoRALinear, Tensor], Tensor]) -> Iterator[None]:
    """Give modules another forward while this lasts."""
    try:
        for module in modules:
            module.forward = partial(forward, module)  # type: ignore[method-assign]
        yield
    finally:
        for module in modules:
            del module.forward
