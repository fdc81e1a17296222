"""What must be as it was when a tile is computed again: autocast and the random state.

A recomputed dropout must drop the same elements. The state is noted before each tile, and forgotten at once when the
tile drew nothing, so that a layer without dropout keeps nothing.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of the CPU's generator and of one device's."""

    cpu: Tensor
    device: Tensor | None
    device_type: str

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """Note the state as it is."""
        other = None if device.type in ("cpu", "meta") else torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), other, device.type)

    @classmethod
    def fresh(cls, device: torch.device) -> "RandomState":
        """Turn to a state drawn from the present one, whose numbers nobody else draws, and note it."""
        torch.manual_seed(int(torch.randint(2**62, ())))
        return cls.now(device)

    def same(self, other: "RandomState") -> bool:
        """Whether nothing was drawn between the two."""
        if not torch.equal(self.cpu, other.cpu):
            return False
        return self.device is None or other.device is None or torch.equal(self.device, other.device)

    def restore(self, device: torch.device) -> None:
        """Go back to this state."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.get_device_module(device).set_rng_state(self.device, device)


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Leave the random state as it was before, whatever happens inside."""
    before = RandomState.now(device)
    try:
        yield
    finally:
        before.restore(device)


@dataclass(frozen=True)
class Autocast:
    """The autocast settings of a device type and of the CPU."""

    settings: tuple[tuple[str, bool, torch.dtype], ...]
    cached: bool

    @classmethod
    def now(cls, device: torch.device) -> "Autocast":
        """Note the settings as they are."""
        kinds = dict.fromkeys(("cpu", "cpu" if device.type == "meta" else device.type))
        settings = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
        return cls(settings, torch.is_autocast_cache_enabled())

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run under these settings."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self.settings:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cached))
            yield
