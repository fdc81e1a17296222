"""Where Triton kernels run and where they cannot; the one file about them that does not import triton.

Triton compiles for an NVIDIA card when a kernel is first launched. It launches on the *current* device and stream of
torch, so `on_device` makes a tensor's device the current one. Nothing here starts CUDA until a tensor is on a card.
"""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

OLDEST = (7, 5)  # Turing (T4, RTX 20): half-precision tensor cores; Triton compiles for nothing older

# The first with bfloat16 instructions. On older cards bfloat16 is converted by torch, before and after a kernel.
BFLOAT16 = (8, 0)


def unavailable() -> str | None:
    """Return why Triton kernels cannot be used on this machine, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
    if find_spec("triton") is None:
        return "the package triton is missing; it comes with torch on Linux, for Windows install triton-windows"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"the card has compute capability {_dotted(capability)}, Triton needs {_dotted(OLDEST)}"
    return None


def why() -> str:
    """Return what is in use, for the report of `longfit.kernels.dispatch.backends`."""
    return f"Triton kernels for {torch.cuda.get_device_name()}"


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's card the current device, on whose current stream a kernel is launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def kernel_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that a kernel reads or writes in place of ``dtype``: fp32 for fp64, and for bf16 on old cards.

    The results are the same: values enter as fp32 anyway, and an fp32 result is rounded once, here or there.
    """
    if dtype == torch.float64:
        return torch.float32
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < BFLOAT16:
        return torch.float32
    return dtype


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
