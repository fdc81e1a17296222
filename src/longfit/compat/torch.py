"""The private names of torch that longfit uses, one function each."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def autograd_function_of(node: Any) -> type | None:
    """Return the ``autograd.Function`` that a node of the graph belongs to; None for torch's own nodes.

    A swept layer asks it to learn whether the gradient of its input goes to another swept layer, which may overwrite
    it. Without the name layers would never share that memory; nothing would be wrong.
    """
    function = getattr(type(node), "_forward_cls", None)
    return function if isinstance(function, type) else None


def storage_identity(tensor: Tensor) -> int:
    """Return a number that is the same for tensors which share their memory, and for no others alive at the time.

    ``data_ptr`` is 0 for all tensors without memory (fake, meta, empty ones).
    """
    number: int = tensor.untyped_storage()._cdata
    return number


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been written to in place, as autograd counts it.

    A saved layer input that was changed between forward and backward is found by it.
    """
    return tensor._version


def forward_is_hooked(module: nn.Module) -> bool:
    """Whether somebody watches what goes into or comes out of a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody watches a module's forward or backward."""
    return forward_is_hooked(module) or bool(module._backward_hooks or module._backward_pre_hooks)


def dispatch_mode_is_active() -> bool:
    """Whether a ``TorchDispatchMode`` wants to see every operator (fake tensors, tracers, counters)."""
    return torch._C._len_torch_dispatch_stack() > 0


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply int8 matrices into int32, ``[n, i] [i, m] -> [n, m]``; saturates on some processors.

    torch has no public product of integers that is fast. Without it, integer products are taken in float32.
    """
    return torch._int_mm(a, b)


def put_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a module a parameter past ``register_parameter``, which PEFT replaces while it builds on the meta device."""
    module._parameters[name] = parameter


def multiply_all_(tensors: list[Tensor], factor: float) -> None:
    """Multiply tensors by a number in place, in few launches on a card."""
    torch._foreach_mul_(tensors, factor)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch's CPU allocator says so only in the text of a RuntimeError."""
    text = "DefaultCPUAllocator: can't allocate"
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or text in str(error)


# Attention kernels that take and return the log-sum-exp: torch's public attention function hides it, and without it
# tiles cannot be merged nor differentiated one by one.
flash_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
flash_forward = torch.ops.aten._flash_attention_forward.default
flash_backward = torch.ops.aten._flash_attention_backward.default
efficient_forward = torch.ops.aten._efficient_attention_forward.default
efficient_backward = torch.ops.aten._efficient_attention_backward.default


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast asks for on a device; None where it is off. The meta device knows no autocast."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Turn autocast off on a device, for the time of a ``with`` block."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def holds_values(tensor: Tensor) -> bool:
    """Whether a tensor has numbers, or only a shape: meta and fake tensors, with which memory is counted."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def unwatched(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function of torch on the plain tensors that subclasses stand for; its results are plain too."""
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)
