"""What this processor can run and which dtype it multiplies fast, found without torch: a memory plan asks too.

A processor without bf16 instructions emulates them: on two AVX2 cores a bf16 linear layer of torch runs at 7.5 GFLOP/s
and a float32 one at 111 to 148. So ``auto`` is bfloat16 only where the instructions are: AVX512-BF16 or AMX on x86-64,
FEAT_BF16 on Linux on ARM. On macOS it is float32, as torch has no bf16 product that uses them there.

``LONGFIT_ISA`` forces an instruction set here, in the C++ kernels and, through :func:`force`, in torch.
"""

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).with_name("_longfit.so")

TORCH_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""What holds torch's own kernels, oneDNN and MKL to an instruction set; read when torch is first imported."""

_TORCH_NAMES = {
    "scalar": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
}

_BF16 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512vbmi"}
_X86_SETS = {
    "amx_bf16": {*_BF16, "amx_tile", "amx_bf16"},
    "avx512_bf16": _BF16,
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "bmi2"},
}


def force() -> None:
    """Hold torch to the instruction set that ``LONGFIT_ISA`` names; what the user set for torch himself stays.

    Call it before torch is imported; afterwards it has no effect.
    """
    names = _TORCH_NAMES.get(os.environ.get("LONGFIT_ISA", ""))
    for variable, name in zip(TORCH_VARIABLES, names or (), strict=False):
        os.environ.setdefault(variable, name)


@cache
def features() -> frozenset[str]:
    """Names of the processor's features, as Linux spells them; empty where the system has no such list."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="ascii", errors="ignore").splitlines() if info.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


@cache
def instruction_sets() -> tuple[str, ...]:
    """Instruction sets that this processor runs of those that the C++ library knows, the fastest first."""
    library = Path(os.environ.get("LONGFIT_LIBRARY", LIBRARY))
    if library.is_file():
        try:
            handle = ctypes.CDLL(str(library))
            handle.longfit_isas.restype = ctypes.c_char_p
            return tuple(handle.longfit_isas().decode().split(","))
        except (OSError, AttributeError):
            pass  # not a library of ours: kernels/cpu/library.py says so where it is needed
    if platform.machine() in ("aarch64", "arm64"):
        return ("neon", "scalar")
    return (*(name for name, needed in _X86_SETS.items() if needed <= features()), "scalar")


def instruction_set() -> str:
    """The instruction set in use: what ``LONGFIT_ISA`` names, else the fastest."""
    return os.environ.get("LONGFIT_ISA") or instruction_sets()[0]


def has_kernels() -> bool:
    """Whether the C++ library was built; without it the references in torch do the work."""
    return Path(os.environ.get("LONGFIT_LIBRARY", LIBRARY)).is_file()


def bf16_instructions() -> str | None:
    """The bf16 instructions that products use here, named for people; None where bf16 would be emulated."""
    forced = os.environ.get("LONGFIT_ISA")
    if forced is not None and forced not in ("amx_bf16", "avx512_bf16", "neon"):
        return None
    if sys.platform == "linux" and "bf16" in features() and platform.machine() == "aarch64":
        return "ARM's BF16"
    if "amx_bf16" in features() and forced in (None, "amx_bf16"):
        return "AMX"
    if "avx512_bf16" in features() or "avx512_bf16" in instruction_sets():
        return "AVX512-BF16"
    return None


def auto_dtype(device_type: str = "cpu") -> tuple[str, str]:
    """What ``dtype: auto`` means.

    Args:
        device_type: ``"cpu"``, or ``"cuda"`` for a card that computes in bfloat16.
    Returns: ``"bfloat16"`` or ``"float32"``, and the reason.
    """
    if device_type != "cpu":
        return "bfloat16", "this device multiplies it fast"
    found = bf16_instructions()
    if found is not None:
        return "bfloat16", f"this processor has {found}"
    return "float32", f"this processor ({instruction_set()}) has no bf16 instructions"
