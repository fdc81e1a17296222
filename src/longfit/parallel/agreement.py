"""Compare what the processes of a run see before they begin, versions, settings and data; let them choose alike.

Replicas that began from different data or settings would train on, each towards its own model, and average nonsense;
different versions may call different exchanges, and hang. So each process describes itself, all descriptions are
gathered, and what differs is named with the processes that differ.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch.distributed as dist

from longfit.errors import ProcessesError

PACKAGES = ("longfit", "torch", "transformers", "peft", "accelerate")
"""Whose versions must agree: they decide what is computed, and in which order it is exchanged."""

SHOWN = 5
"""Differences told; the rest is counted."""


def versions() -> dict[str, str]:
    """Return ``{"version of torch": "2.13.0", ...}``."""
    found = {}
    for package in PACKAGES:
        try:
            found[f"version of {package}"] = version(package)
        except PackageNotFoundError:  # longfit run from its sources
            found[f"version of {package}"] = "not installed"
    return found


def require_agreement(description: Mapping[str, object]) -> None:
    """Compare the descriptions of all processes; call it in every one of them.

    Args:
        description: what must be the same, by a name that the user understands; plain values.
    Raises: ProcessesError: something differs; all processes raise it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(description))
    lines = differences(gathered)
    if lines:
        shown = lines[:SHOWN] + [f"... and {len(lines) - SHOWN:,} more"] * (len(lines) > SHOWN)
        advice = "give all processes the same command, files and installation"
        raise ProcessesError("\n  ".join([f"the processes of this run do not agree; {advice}:", *shown]))


def least(numbers: Mapping[str, int]) -> dict[str, int]:
    """Return, in all processes, the smallest number that any of them has under each name; call it in every one.

    What a process reads from its machine, such as the memory that is free, is another number a moment later. What is
    chosen by it must be chosen by the same number everywhere.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return dict(numbers)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(numbers))
    return {name: min(of_process[name] for of_process in gathered) for name in numbers}


def differences(descriptions: list[dict[str, object]]) -> list[str]:
    """Say what differs, and who has what: ``data of a.txt: process 0 has 12ab, process 1 has 34cd``."""
    lines = []
    for name in dict.fromkeys(name for description in descriptions for name in description):
        ranks: dict[str, list[int]] = {}
        for rank, description in enumerate(descriptions):
            ranks.setdefault(str(description.get(name, "nothing")), []).append(rank)
        if len(ranks) > 1:
            said = [f"process {', '.join(map(str, who))} has {value}" for value, who in ranks.items()]
            lines.append(f"{name}: {'; '.join(said)}")
    return lines
