"""What tests on fake tensors share: bytes counted while they live, and stand-ins for what has no values or device."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are made under it and still alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.sizes:
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.sizes[key] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key)
        return result

    def _gone(self, key):
        self.now -= self.sizes.pop(key, 0)


class HostActivations:
    """What the accelerator sees of layer inputs that wait elsewhere: one tile at a time."""

    aliases = False
    place = "in host memory"

    def open(self, num_tiles):
        return HostInput()

    def open_states(self, num_tiles):
        return HostInput()


class HostInput:
    def __init__(self):
        self.likes = {}

    def put(self, index, tile):
        self.likes[index] = (tile.shape, tile.dtype)

    def settle(self, index):
        pass

    def prefetch(self, index):
        pass

    def get(self, index):
        shape, dtype = self.likes[index]
        return torch.empty(shape, dtype=dtype)

    def close(self):
        pass


def tile_forward(tile):
    q, v = tile.q, tile.v
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def tile_backward(tile, grad_out, out, lse, *, grad_k, grad_v):
    torch.empty(tile.q.shape, dtype=torch.float32)
    return torch.empty_like(tile.q)
