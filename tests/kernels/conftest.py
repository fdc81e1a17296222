"""Every instruction set in turn, Triton with and without a card, and results poisoned before the kernel writes them."""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from longfit.kernels.cpu import library as cpu_library


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16", "neon"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with one instruction set forced; skipped with its reason where it cannot run."""
    reason = cpu_library.unavailable()
    if reason is not None:
        pytest.skip(reason)
    library = cpu_library.library()
    if request.param not in library.isas:
        pytest.skip(f"this processor and build have {', '.join(library.isas)}")
    before, library.isa = library.isa, request.param
    yield request.param
    library.isa = before


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN or 0xFF, so that a value left unwritten cannot pass for right."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # what a card cannot do in one order is not asked for
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the tensors of a Triton kernel are: on a card, or on the CPU under Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is missing; it comes with the dev extra on Linux")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted != (request.param == "interpreter"):
        pytest.skip("set TRITON_INTERPRET=1 to interpret kernels where they can be compiled, unset it to compile them")
    if interpreted:
        _correct_interpreter(monkeypatch)
    return "cpu" if interpreted else "cuda"


def _correct_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter do with bfloat16 what a card does.

    By itself it cuts fp32 off where a card rounds to the nearest, and multiplies bit patterns as if they were numbers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding(values: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        if str(source) == "fp32" and str(target) == "bf16":
            return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(values, source, target, mode)

    def widening(builder: object, a: Any, b: Any, *rest: Any) -> object:
        wide = [interpreter.TensorHandle(_to_fp32(x.data), tl.float32) if str(x.dtype) == "bf16" else x for x in (a, b)]
        return dot(builder, *wide, *rest)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widening)


def _to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
