"""The C++ library: finds it, checks that it belongs to this longfit, chooses the instruction set (by ctypes).

``_longfit.so`` lies beside this file; the package's build makes it from ``csrc/``. It holds each kernel once per
instruction set ("ISA"), named ``longfit_<kernel>_<isa>``; the fastest that the processor runs is used. Two environment
variables are for tests and bug reports: ``LONGFIT_ISA`` forces an instruction set, ``LONGFIT_LIBRARY`` names another
library file.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longfit.errors import BackendError
from longfit.kernels.dense_weight_bytes import TILE_BYTES

ABI = 9  # LONGFIT_ABI of csrc/longfit.h

# Results from this size on are new memory from the system, not from the allocator's cache.
HUGE_BYTES = 4 << 20

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Weight4Struct(ctypes.Structure):
    """``longfit_weight4`` of csrc/longfit.h, which explains the fields."""

    _fields_ = [
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("codebook", c_void_p),
        ("scale_map", c_void_p),
        ("nested", c_void_p),
        ("offset", c_void_p),
        ("element_stride", c_int64),
        ("code_stride", c_int64),
        ("scale_stride", c_int64),
        ("block_stride", c_int64),
        ("first_block", c_int64),
        ("block_size", c_int64),
        ("absmax_block_size", c_int64),
    ]


_SIGNATURES: dict[str, list[Any]] = {
    "dequantize_4bit": [
        ctypes.POINTER(Weight4Struct), c_int64, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int, c_int,
    ],
    "linear_4bit": [ctypes.POINTER(Weight4Struct), c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int, c_int],
    "matmul_4bit": [
        ctypes.POINTER(Weight4Struct), c_int, c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int,
    ],
    "quantize_4bit": [c_void_p, c_int64, c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int],
    "nearest_table": [c_void_p, c_int, c_void_p],
    "quantize_8bit": [c_void_p, c_int64, c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int],
    "dequantize_8bit": [c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int, c_int],
    "adamw": [c_void_p, c_int64, c_int],
    "adamw_maps": [c_void_p, c_void_p, c_void_p, c_void_p],
    "attention_forward": [c_void_p] * 6,
    "attention_backward": [c_void_p] * 10,
    "attention_forward_f32": [c_void_p, c_int, *[c_void_p] * 5],
    "attention_backward_f32": [c_void_p, c_int, *[c_void_p] * 9],
    "rms_norm_forward": [c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p, c_void_p, c_int, c_int],
    "rms_norm_backward": [*[c_void_p] * 4, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int, c_int],
    "swiglu_forward": [c_void_p, c_void_p, c_int64, c_void_p, c_int, c_int],
    "swiglu_backward": [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int, c_int],
    "cross_entropy": [c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p, c_int, c_int],
}  # fmt: skip


class Library:
    """The loaded library and the instruction set in use.

    Attributes:
        path: the file.
        isas: what this processor can run of what the file holds, fastest first.
        isa: the one in use; assign to force another.
    """

    def __init__(self, path: Path, isa: str | None = None) -> None:
        if not path.exists():
            raise BackendError(
                f"the C++ library {path.name} is missing in {path.parent}: longfit was installed without a working "
                "compiler; install GCC or Clang and install longfit again"
            )
        try:
            self._handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(f"the C++ library does not load ({error}); install longfit again") from error
        abi = self._handle.longfit_abi()
        if abi != ABI:
            raise BackendError(f"the C++ library {path} has version {abi}, this longfit needs {ABI}; install it again")
        self._handle.longfit_isas.restype = ctypes.c_char_p
        self.path = path
        self.isas = tuple(self._handle.longfit_isas().decode().split(","))
        self._kernels: dict[tuple[str, str], Any] = {}
        self._tiles = threading.local()
        self._isa = self.isas[0]
        if isa is not None:
            self.isa = isa

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._isa

    @isa.setter
    def isa(self, isa: str) -> None:
        if isa not in self.isas:
            raise BackendError(f"LONGFIT_ISA: got {isa!r}; this processor and library have {', '.join(self.isas)}")
        self._isa = isa

    @property
    def multiplies_bf16(self) -> bool:
        """Whether the instruction set in use has products of bf16 numbers."""
        return self._isa in ("avx512_bf16", "amx_bf16")

    @property
    def multiplies_4bit(self) -> bool:
        """Whether the library's own bf16 product with a 4-bit weight is the fastest: not where torch's GEMM has AMX."""
        return self._isa == "avx512_bf16"

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return uninitialised memory for a result, on huge pages where it is large."""
        result = torch.empty(shape, dtype=dtype)
        if result.nbytes >= HUGE_BYTES:
            self._handle.longfit_advise_huge_pages(c_void_p(result.data_ptr()), c_int64(result.nbytes))
        return result

    def tile(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return this thread's scratch memory for a tile of W: kept, as fresh pages would cost more than filling it."""
        num_bytes = math.prod(shape) * dtype.itemsize
        kept: Tensor | None = getattr(self._tiles, "bytes", None)
        if kept is None or kept.numel() < num_bytes:
            kept = self._tiles.bytes = torch.empty(max(num_bytes, TILE_BYTES), dtype=torch.uint8)
        return kept[:num_bytes].view(dtype).view(shape)

    def kernel(self, name: str) -> Any:
        """Return a kernel for the instruction set in use."""
        key = (name, self._isa)
        if key not in self._kernels:
            function = getattr(self._handle, f"longfit_{name}_{self._isa}")
            function.argtypes, function.restype = _SIGNATURES[name], None
            self._kernels[key] = function
        return self._kernels[key]


@cache
def library() -> Library:
    """Load the library.

    Raises: BackendError: it is missing, broken or of another version, or ``LONGFIT_ISA`` cannot be run here.
    """
    beside = Path(__file__).with_name("_longfit.so")
    return Library(Path(os.environ.get("LONGFIT_LIBRARY", beside)), os.environ.get("LONGFIT_ISA"))


def unavailable() -> str | None:
    """Return why the library cannot be used, or None.

    Raises: BackendError: ``LONGFIT_ISA`` or ``LONGFIT_LIBRARY`` asks for something that is not there.
    """
    try:
        library()
    except BackendError as error:
        if "LONGFIT_ISA" in os.environ or "LONGFIT_LIBRARY" in os.environ:
            raise
        return str(error)
    return None


def why() -> str:
    """Return what is in use, for the report of `longfit.kernels.dispatch.backends`."""
    return f"C++ kernels for {library().isa}"
