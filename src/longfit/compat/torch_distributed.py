"""What of torch.distributed is private, or costs its import: one function each."""

from typing import Any

from torch import Tensor, nn


def default_store() -> Any:
    """Return a connection of one's own to the store of the default process group, for another thread.

    torch has no public way to the store that a group was made with; ``clone`` gives a second connection, so that a
    thread which waits on one does not hold up the other.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    return store.clone()


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has: its own rows of a DTensor, else all of it."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
