"""One thing that takes memory, somewhere, in some phases of a run."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Component:
    """Something that takes memory.

    Attributes:
        name: for people.
        place: "accelerator", "host" or "disk".
        by_phase: its bytes in the phases in which it exists.
    """

    name: str
    place: str
    by_phase: Mapping[str, int]

    @property
    def largest(self) -> int:
        """Most bytes in any phase."""
        return max(self.by_phase.values(), default=0)
