"""The private names of torch.distributed that longfit uses, one function each."""

from typing import Any


def default_store() -> Any:
    """Return a connection of one's own to the store of the default process group, for another thread.

    torch has no public way to the store that a group was made with; ``clone`` gives a second connection, so that a
    thread which waits on one does not hold up the other.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    return store.clone()
