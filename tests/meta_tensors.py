"""What tests on the meta device share: bytes counted while they live, and layer inputs that wait elsewhere."""

import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from longfit.compat.torch import storage_identity


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are made under it and still alive, without those of a model."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {storage_identity(x): 0 for x in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and storage_identity(leaf) not in self.sizes:
                storage, key = leaf.untyped_storage(), storage_identity(leaf)
                size = storage.nbytes()
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
        self.likes[index] = tile.shape, tile.dtype, tile.device

    def settle(self, index):
        pass

    def prefetch(self, index):
        pass

    def get(self, index):
        shape, dtype, device = self.likes[index]
        return torch.empty(shape, dtype=dtype, device=device)

    def close(self):
        pass


def bytes_of_tensors(model):
    """Bytes of the parameters and buffers of a model, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({storage_identity(x): x.untyped_storage().nbytes() for x in tensors}.values())


@contextmanager
def positions_not_read():
    """Keep transformers from looking in position_ids for packed documents: meta tensors have no values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
        yield
