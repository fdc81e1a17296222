"""Which backend computes norms, gated products, rotary embeddings and the cross-entropy of a call.

    cpu         the C++ kernels (``cpu/elementwise.py``), on the dtypes and processors that they say they take
    liger       liger-kernel's Triton kernels, put into a whole model (``model/liger_kernels.py``)
    reference   the model's own torch operations

Who has such an operation asks here before it calls the kernel; `use_backend` decides here too.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from longfit.kernels.cpu import elementwise as cpu_elementwise
from longfit.kernels.dispatch import CALLS, Choice, dispatcher
from longfit.kernels.triton import device as triton_device

OPS = tuple(op for op in CALLS if op != "attention")


def runs_kernel(op: str, *tensors: Tensor) -> bool:
    """Whether the C++ kernel of an operation computes a call with these tensors.

    Raises: BackendError: a backend is forced that cannot.
    """
    forced = dispatcher().forced_for(op)
    if forced is None:  # the way of almost every call
        return cpu_elementwise.supported() is None and cpu_elementwise.takes(*tensors)
    if forced == "liger":  # the module's own forward is liger's by now
        return False
    return dispatcher().choose_call(op, lambda backend: _why_not_these(backend, *tensors)).backend == "cpu"


def choice(op: str, device: str, dtype: torch.dtype) -> Choice:
    """Return the backend of an operation for a device type and a dtype, and why."""
    return dispatcher().choose_call(op, lambda backend: why_not(backend, device, dtype))


def why_not(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Say why a backend does not compute these operations; None where it does."""
    if backend == "reference":
        return None
    if backend == "liger":
        return liger_unavailable(device) or _not_compiled(dtype)
    if device != "cpu":
        return f"it runs on the CPU, not on {device}"
    reason = cpu_elementwise.supported()
    if reason is None and not cpu_elementwise.takes(torch.empty(0, dtype=dtype)):
        reason = f"it does not compute in {dtype}"
    return reason


def liger_unavailable(device: str) -> str | None:
    """Say why liger-kernel cannot run on a device type; None where it can."""
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install 'longfit[cuda]'"
    return triton_device.unavailable() if device == "cuda" else f"liger-kernel needs a card, this is {device}"


def _not_compiled(dtype: torch.dtype) -> str | None:
    compiled = triton_device.kernel_dtype(dtype, torch.device("cuda"))
    return None if compiled == dtype else f"it has no kernels for {dtype} here"


def _why_not_these(backend: str, *tensors: Tensor) -> str | None:
    reason = why_not(backend, tensors[0].device.type, tensors[0].dtype)
    if reason is None and backend == "cpu" and not cpu_elementwise.takes(*tensors):
        reason = "it takes plain tensors of one dtype on the CPU"
    return reason
