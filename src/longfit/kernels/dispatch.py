"""Which code runs an operation: one table, one choice, said aloud.

    op             what it does                                             backends, best first
    quantize_4bit  weight -> packed codes and their state                   triton (CUDA), cpu (C++), reference
    ...            (`TABLE` below)

`reference` is `numerics`, or for norms, gated products, the loss and attention plain torch; every other backend of a
kernel returns its bits (the matmuls: the product with the same weight, summed in another order), and of the others
agrees with it within rounding. The choice depends on the device, on what this machine can run and, for the operations
of `CALLS`, on the dtype and shape of a call; never on the data. `backends` tells it with its reason, `use_backend`
forces it for one operation or for all, and a forced backend that cannot run raises. Where a choice degrades, because
the C++ library or Triton is missing or an attention has no kernel, the first call warns once and goes on.

The functions here have the signatures of `numerics`; each is a torch operator ``longfit::<name>`` (schemas in `ops.py`,
all argument checks in `checks.py`), so that ``torch.compile`` sees one opaque node. They have no gradient: layers and
optimisers define theirs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from longfit.errors import BackendError
from longfit.kernels import ops
from longfit.numerics.adamw import AdamwUpdate
from longfit.numerics.quant_state import QuantState
from longfit.numerics.row_format import RowFormat

# Backend -> the module whose functions have the operations' names, and the device types it serves.
MODULES = {
    "reference": "longfit.kernels.reference",
    "cpu": "longfit.kernels.cpu.weights_4bit",
    "triton": "longfit.kernels.triton.device",
}
# Operations that have a file of their own beside that module; only these files import triton.
FILES = {
    ("cpu", "adamw_step"): "longfit.kernels.cpu.adamw",
    ("triton", "quantize_4bit"): "longfit.kernels.triton.weights_4bit",
    ("triton", "dequantize_4bit"): "longfit.kernels.triton.weights_4bit",
    ("triton", "dequantize_rows"): "longfit.kernels.triton.weights_4bit",
    ("triton", "quantize_8bit"): "longfit.kernels.triton.blockwise_8bit",
    ("triton", "dequantize_8bit"): "longfit.kernels.triton.blockwise_8bit",
    ("triton", "linear_4bit"): "longfit.kernels.triton.linear_4bit",
    ("triton", "linear_4bit_grad_input"): "longfit.kernels.triton.linear_4bit",
    ("triton", "adamw_step"): "longfit.kernels.triton.adamw",
}
DEVICES = {"cpu": ("cpu",), "triton": ("cuda",), "liger": ("cuda",), "flash": ("cuda",), "efficient": ("cuda",)}

# Operation -> backends, best first; the last one runs anywhere.
TABLE = {
    "quantize_4bit": ("triton", "cpu", "reference"),
    "dequantize_4bit": ("triton", "cpu", "reference"),
    "quantize_8bit": ("triton", "cpu", "reference"),
    "dequantize_8bit": ("triton", "cpu", "reference"),
    "dequantize_rows": ("triton", "cpu", "reference"),
    "linear_4bit": ("triton", "cpu", "reference"),
    "linear_4bit_grad_input": ("triton", "cpu", "reference"),
    "adamw_step": ("triton", "cpu", "reference"),
    "attention": ("flash", "efficient", "cpu", "aten", "reference"),
    "rms_norm": ("liger", "cpu", "reference"),
    "swiglu": ("liger", "cpu", "reference"),
    "rotary": ("liger", "reference"),
    "cross_entropy": ("cpu", "reference"),
}
CALLS = ("attention", "rms_norm", "swiglu", "rotary", "cross_entropy")
"""Operations whose backend is chosen call by call, by who calls them: `attention/backends` and `elementwise.py`."""

KERNELS = tuple(op for op in TABLE if op not in CALLS)
"""Operations that are one function a backend, and run by the functions below."""

NAMES = tuple(dict.fromkeys(backend for row in TABLE.values() for backend in row))


@dataclass(frozen=True)
class Choice:
    """The backend that runs an operation, and why it is this one."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Rule:
    """What is forced: a backend for every operation that has it, and others for single operations."""

    backend: str | None = None
    ops: tuple[tuple[str, str], ...] = ()

    def of(self, op: str) -> str | None:
        """The backend that is forced for an operation."""
        own = dict(self.ops).get(op)
        return own or (self.backend if self.backend in TABLE[op] else None)

    def with_op(self, op: str, backend: str | None) -> Rule:
        """The same with another backend for one operation; None frees it."""
        others = {name: forced for name, forced in self.ops if name != op}
        return Rule(self.backend, tuple((others | ({op: backend} if backend is not None else {})).items()))


class Dispatcher:
    """Chooses backends; holds what is forced and which degradations have been reported."""

    def __init__(self) -> None:
        self.forced = Rule()
        self._reported: set[str] = set()
        self._chosen: dict[tuple[str, torch.device], Any] = {}  # function for an operation on a device, as forced now

    def force(self, backend: str | None, op: str | None = None) -> Rule:
        """Use one backend for an operation or for every one that has it; None chooses freely again.

        Returns: what was forced before, for `restore`.
        """
        if op is not None and op not in TABLE:
            raise BackendError(f"op: got {op!r}; allowed: {', '.join(TABLE)}")
        if backend is not None:
            self._require(backend, op)
        before = self.forced
        self.restore(before.with_op(op, backend) if op is not None else Rule(backend))
        return before

    def restore(self, rule: Rule) -> None:
        """Go back to what was forced before."""
        self.forced, self._chosen = rule, {}

    def forced_for(self, op: str) -> str | None:
        """Return the backend that is forced for an operation; None where it is chosen freely."""
        return self.forced.of(op)

    def report(self, message: str, *, stacklevel: int = 2) -> None:
        """Warn about a choice that degrades, once."""
        if message not in self._reported:
            self._reported.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)

    def choose_call(self, op: str, why_not: Callable[[str], str | None]) -> Choice:
        """Return the backend for a call of one of `CALLS`.

        Args:
            op: the operation.
            why_not: backend -> None, or why it cannot take the call.
        Raises: BackendError: a forced backend cannot take it.
        """
        forced = self.forced_for(op)
        if forced is not None:
            reason = why_not(forced)
            if reason is not None:
                raise BackendError(f"{op} with the backend {forced!r}, which is forced: {reason}")
            return Choice(forced, "forced by use_backend")
        passed: list[str] = []
        for backend in TABLE[op]:
            reason = why_not(backend)
            if reason is None:
                return Choice(backend, "; ".join(passed) or "the fastest")
            passed.append(f"not {backend}: {reason}")
        raise BackendError(f"{op}: {'; '.join(passed)}")

    def choose(self, op: str, device: str) -> Choice:
        """Return the backend for an operation on a device type.

        Raises: BackendError: a forced backend cannot run it.
        """
        forced = self.forced_for(op)
        if forced is not None:
            why_not = _why_not(forced, op, device)
            if why_not is not None:
                raise BackendError(f"{op} with the backend {forced!r}, which is forced: {why_not}")
            return Choice(forced, "forced by use_backend")
        passed: list[str] = []
        for backend in TABLE[op]:
            if device not in DEVICES.get(backend, (device,)):
                continue  # made for another device: no news
            why_not = _why_not_here(backend)
            if why_not is None:
                return Choice(backend, "; ".join(passed) or _module(backend).why())
            passed.append(f"not {backend}: {why_not}")
        raise BackendError(f"{op} on {device}: {'; '.join(passed)}")

    def function(self, op: str, device: torch.device) -> Any:
        """Return the function that runs an operation on a device; warns once if it is not the compiled one."""
        key = (op, device)  # asking a device for its type takes longer than the rest
        if key not in self._chosen:
            choice = self.choose(op, device.type)
            slow = choice.backend == "reference" and device.type in ("cpu", "cuda")
            if slow and self.forced_for(op) is None:
                self.report(f"longfit runs its slow reference kernels; {choice.reason}", stacklevel=5)
            self._chosen[key] = getattr(_file(choice.backend, op), op)
        return self._chosen[key]

    def _require(self, backend: str, op: str | None) -> None:
        allowed = NAMES if op is None else TABLE[op]
        if backend not in allowed:
            raise BackendError(f"backend: got {backend!r}; allowed: {', '.join(allowed)}, or None to choose freely")
        why_not = _why_not_here(backend) if backend in MODULES else None
        if why_not is not None:
            raise BackendError(f"backend {backend!r} cannot be used: {why_not}")


class Forced:
    """What `use_backend` returns: a context that puts the previous choice back when it ends."""

    def __init__(self, dispatcher: Dispatcher, before: Rule) -> None:
        self._dispatcher, self._before = dispatcher, before

    def __enter__(self) -> Forced:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._dispatcher.restore(self._before)


@cache
def dispatcher() -> Dispatcher:
    """Return the one dispatcher of this process, which owns the forced choice."""
    return Dispatcher()


_CALLS = ops.register(dispatcher().function)


def use_backend(name: str | None, *, op: str | None = None) -> Forced:
    """Force a backend, from now on or for a ``with`` block.

    Args:
        name: "reference", "cpu", "triton", "liger", or of attention "flash", "efficient", "aten"; None chooses freely
            again.
        op: one operation of ``longfit doctor``'s list; None forces every operation that has such a backend, and
            leaves the others free.
    Returns: a context manager; leaving it restores what was forced before.
    Raises: BackendError: the backend is unknown or cannot run here; the message has the reason. A call that a forced
        backend cannot take raises it too.
    """
    return Forced(dispatcher(), dispatcher().force(name, op))


def backends(device: str = "cpu") -> dict[str, Choice]:
    """Return, for every operation of `KERNELS`, the backend that would run it on a device type, and why."""
    return {op: dispatcher().choose(op, device) for op in KERNELS}


def quantize_4bit(
    weight: Tensor,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    absmax_block_size: int = 256,
) -> tuple[Tensor, QuantState]:
    """Quantise a weight to packed 4-bit codes and their state; see `longfit.numerics.quant_state.quantize_4bit`."""
    return _CALLS["quantize_4bit"](weight, quant_type, block_size, double_quant, absmax_block_size)


def dequantize_4bit(packed: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """Turn packed 4-bit codes back into a weight; see `longfit.numerics.quant_state.dequantize_4bit`."""
    return _CALLS["dequantize_4bit"](packed, state, state.dtype if dtype is None else dtype)


def quantize_8bit(values: Tensor, codebook: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Round each value to its nearest level; see `longfit.numerics.blockwise.quantize_blockwise`."""
    return _CALLS["quantize_8bit"](values, codebook, block_size)


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, *, block_size: int, dtype: torch.dtype) -> Tensor:
    """Look up each code's level and scale it; see `longfit.numerics.blockwise.dequantize_blockwise`."""
    return _CALLS["dequantize_8bit"](codes, absmax, codebook, block_size, dtype)


def dequantize_rows(
    rows: Tensor, constants: Tensor, fmt: RowFormat, dtype: torch.dtype | None = None, *, first_row: int = 0
) -> Tensor:
    """De-quantise rows of a weight; see `longfit.numerics.row_format.dequantize_rows`."""
    return _CALLS["dequantize_rows"](rows, constants, fmt, fmt.dtype if dtype is None else dtype, first_row)


def linear_4bit(x: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat) -> Tensor:
    """Compute ``Y = X dq(W)^T`` without a full 16-bit copy of W (QLoRA, section 3, equation 5 without the adapter).

    Args:
        x: ``[..., in_features]``, fp16, bf16, fp32 or fp64; W is de-quantised to this dtype.
        rows, constants, fmt: the weight as `longfit.numerics.row_format.to_rows` lays it out; rows may be strided.
    Returns: ``[..., out_features]`` in the dtype of ``x``. No bias.
    Raises: ValueError, TypeError: the arguments do not go together.
    """
    return _CALLS["linear_4bit"](x, rows, constants, fmt)


def linear_4bit_grad_input(grad: Tensor, rows: Tensor, constants: Tensor, fmt: RowFormat) -> Tensor:
    """Compute ``dX = dY dq(W)``, the gradient of `linear_4bit` with respect to its input.

    Args:
        grad: ``[..., out_features]``, fp16, bf16, fp32 or fp64; W is de-quantised to this dtype.
        rows, constants, fmt: as in `linear_4bit`.
    Returns: ``[..., in_features]`` in the dtype of ``grad``.
    Raises: ValueError, TypeError: the arguments do not go together.
    """
    return _CALLS["linear_4bit_grad_input"](grad, rows, constants, fmt)


def adamw_step(updates: Sequence[AdamwUpdate]) -> None:
    """Take one AdamW step on runs of elements, in place; see `longfit.numerics.adamw.adamw_step`.

    Not a torch operator: optimisers run outside of traced graphs.
    """
    if updates:
        dispatcher().function("adamw_step", updates[0].param.device)(updates)


def _why_not(backend: str, op: str, device: str) -> str | None:
    if backend not in TABLE[op]:
        return f"it has no {op}"
    if device not in DEVICES.get(backend, (device,)):
        return f"it serves {', '.join(DEVICES[backend])}, the tensors are on {device}"
    return _why_not_here(backend)


def _why_not_here(backend: str) -> str | None:
    return _module(backend).unavailable() if backend in MODULES else "this version of longfit has no such kernels"


@cache
def _module(backend: str) -> ModuleType:
    return import_module(MODULES[backend])


@cache
def _file(backend: str, op: str) -> ModuleType:
    return import_module(FILES.get((backend, op), MODULES[backend]))
