"""Where the last bits of a run's numbers come from, besides its settings and its data.

Another build of the kernels, another instruction set or another version of torch adds numbers in another order. Each
checkpoint says what the run was computed with up to it, and a run that goes on with something else is told so.
"""

from collections.abc import Mapping

import torch

from longfit.files.checksums import file_digest
from longfit.kernels.cpu import processor
from longfit.kernels.cpu.library import library, unavailable
from longfit.parallel.agreement import versions


def computed_with() -> dict[str, str]:
    """Return ``{"version of torch": "2.13.0", "kernels": "12ab...", ...}`` of this process."""
    return {
        **versions(),
        "kernels": "none" if unavailable() else file_digest(library().path)[:8],
        "instruction set": processor.instruction_set(),
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
    }


def told_change(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Say what a run goes on with that it was not computed with before; None where there is nothing to say.

    Args:
        before: of a checkpoint; empty for one that is older than this record.
    """
    changed = [
        f"{name} {before[name]}, now {now.get(name, 'none')}" for name in before if before[name] != now.get(name)
    ]
    if not changed:
        return None
    return f"computed so far with {'; '.join(changed)}: losses may differ from an unbroken run in rounding"
