"""Whether a gradient may be overwritten: only if autograd hands over, untouched and unshared, what we made ourselves.

A swept layer writes dx over dy. In general a backward must not do that: autograd may give the same tensor to several
nodes (the gradient of ``a + b`` goes to both). It may when dy is *ours*: when the consumer of our output took it
straight from us (so that its gradient goes to us and to nobody else), and promised that it gives up the tensor. The
promise is the identity of that tensor's storage, left on the node that will receive it; any other is somebody else's.
"""

from typing import Any

from torch import Tensor


class Receiver:
    """Base of autograd Functions that use up their incoming gradient if they may; its nodes carry ``promised``."""

    promised: int | None = None


def receiver_of(tensor: Tensor) -> Any | None:
    """The node that will receive the gradient of ``tensor``, if it is one of ours; call it in forward."""
    node = tensor.grad_fn
    function = getattr(type(node), "_forward_cls", None)  # torch's link from a node to its autograd.Function
    return node if isinstance(function, type) and issubclass(function, Receiver) else None


def promise(receiver: Any | None, gradient: Tensor) -> None:
    """Give up ``gradient``, which is about to be returned by backward."""
    if receiver is not None:
        receiver.promised = gradient.untyped_storage()._cdata  # unlike data_ptr, also of tensors without memory


def is_promised(node: Any, gradient: Tensor) -> bool:
    """Whether ``node`` may overwrite the gradient that it was called with."""
    return bool(getattr(node, "promised", None) == gradient.untyped_storage()._cdata)
