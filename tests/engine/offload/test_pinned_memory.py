"""Pinned memory is page-aligned and exact, refused in words, and given back to CUDA when its owner goes."""

import gc
import mmap
from types import SimpleNamespace

import pytest
import torch

from longfit.engine.offload.pinned_memory import PinnedMemory
from longfit.errors import PlanError


class Runtime:
    """CUDA's registrations, without CUDA; refuses more than ``limit`` bytes at once."""

    def __init__(self, limit: int = 2**20) -> None:
        self.limit, self.events, self.sizes = limit, [], {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if num_bytes > self.limit:
            return 2
        self.sizes[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        self.events.append("unregister")
        del self.sizes[address]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    cuda = SimpleNamespace(cudart=lambda: found, synchronize=lambda: found.events.append("synchronize"))
    monkeypatch.setattr(torch, "cuda", cuda)
    return found


@pytest.mark.parametrize("num_bytes", [1, mmap.PAGESIZE, mmap.PAGESIZE + 1])
def test_whole_pages_are_registered_and_the_slab_is_exact(runtime: Runtime, num_bytes: int) -> None:
    owner = PinnedMemory()
    slab = owner.slab(num_bytes)
    assert (slab.dtype, slab.shape) == (torch.uint8, (num_bytes,))
    assert not slab.any()
    assert slab.data_ptr() % mmap.PAGESIZE == 0
    assert runtime.sizes == {slab.data_ptr(): -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE}


def test_registrations_are_taken_back_after_the_copies_and_before_the_memory_goes(runtime: Runtime) -> None:
    owner = PinnedMemory()
    kept = owner.slab(5)
    owner.slab(6)
    assert len(runtime.sizes) == 2
    del owner
    gc.collect()
    assert runtime.events == ["synchronize", "unregister", "unregister"]
    assert runtime.sizes == {}
    kept.fill_(1)  # a slab that is still held stays memory


def test_an_owner_of_nothing_does_not_wait_for_the_card(runtime: Runtime) -> None:
    owner = PinnedMemory()
    with pytest.raises(PlanError, match=r"1\.0 MiB of host memory cannot be pinned \(CUDA error 2\); raise the limit"):
        owner.slab(runtime.limit + 1)
    del owner
    gc.collect()
    assert runtime.events == []  # what was refused is not taken back either
