"""When a backward may overwrite its incoming gradient: only if the node after it made that tensor and donated it.

A swept layer writes dx over dy. In general a backward must not do that: autograd may give the same tensor to several
nodes (the gradient of ``a + b`` goes to both). It may when dy is *donated*: when the consumer of our output took it
straight from us (so that its gradient goes to us and to nobody else), and gave the tensor up. A donation is the
identity of that tensor's storage, noted on the node that will receive it; any other tensor is somebody else's.
"""

from typing import Any

from torch import Tensor

from longfit.compat.torch import autograd_function_of, storage_identity


class Receiver:
    """Base of autograd Functions that overwrite a gradient donated to them; its nodes carry ``donated``."""

    donated: int | None = None


def receiver_of(tensor: Tensor) -> Any | None:
    """The node that will receive the gradient of ``tensor``, if it is one of ours; call it in forward."""
    node = tensor.grad_fn
    function = autograd_function_of(node)
    return node if function is not None and issubclass(function, Receiver) else None


def donate(receiver: Any | None, gradient: Tensor) -> None:
    """Give up ``gradient``, which is about to be returned by backward, to the node that receives it."""
    if receiver is not None:
        receiver.donated = storage_identity(gradient)


def is_donated(node: Any, gradient: Tensor) -> bool:
    """Whether ``node`` may overwrite the gradient that it was called with."""
    return bool(getattr(node, "donated", None) == storage_identity(gradient))
