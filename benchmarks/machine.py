"""What the numbers of a benchmark depend on besides its settings: the machine, the versions, the commit."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def processor_name() -> str:
    """The processor as Linux names it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cores_of_processor() -> str:
    """Processor and cores in one phrase."""
    return f"{os.cpu_count()} cores of {processor_name()}"


def commit() -> str:
    """The commit that is checked out; "unknown" outside of a repository."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine(*packages: str) -> dict[str, Any]:
    """Processor, what torch and longfit use of it, the dtype that longfit computes in, and the versions of packages."""
    import torch

    from longfit.kernels.cpu import processor

    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instruction set": processor.instruction_set() + (", forced" if "LONGFIT_ISA" in os.environ else ""),
        "dtype": processor.auto_dtype()[0],
        **{name: version(name) for name in packages or ("torch", "transformers", "peft", "bitsandbytes")},
    }
