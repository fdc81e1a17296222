"""The workspace: one buffer for all matmuls, one per weight inside a block, nothing stale."""

import pytest
import torch
from torch import Tensor

from longfit.kernels.workspace import Workspace, weights_held


class Source:
    """A packed weight, and how often it was de-quantised."""

    def __init__(self, value: float, shape: tuple[int, int] = (4, 8)) -> None:
        self.packed = torch.full((3,), int(value), dtype=torch.uint8)
        self.shape, self.times = shape, 0

    def dequantize(self, out: Tensor) -> None:
        self.times += 1
        out.fill_(self.packed[0].item())

    def dense(self, workspace: Workspace, dtype: torch.dtype = torch.float32) -> Tensor:
        return workspace.dense(self.packed, self.shape, dtype, self.dequantize)


def test_one_buffer_serves_all_matmuls() -> None:
    workspace, a, b = Workspace(), Source(1, (4, 8)), Source(2, (2, 3))
    first = a.dense(workspace)
    second = b.dense(workspace, torch.float16)
    assert first.data_ptr() == second.data_ptr()
    assert second.shape == (2, 3)
    assert second.dtype == torch.float16
    assert (second == 2).all()
    a.dense(workspace)
    assert a.times == 2


def test_inside_a_block_each_weight_is_dequantised_once() -> None:
    workspace, a, b = Workspace(), Source(1), Source(2, (16, 8))
    with workspace.weights_held():
        for _tile in range(3):
            assert (a.dense(workspace) == 1).all()
            with workspace.weights_held():
                assert (b.dense(workspace) == 2).all()
        assert (a.dense(workspace, torch.float64) == 1).all(), "another dtype is another weight"
    assert (a.times, b.times) == (2, 1)


def test_the_next_block_forgets_and_uses_the_memory_again() -> None:
    """Streamed weights: the same addresses hold another layer's bytes in the next block."""
    workspace, a, b = Workspace(), Source(1), Source(2)
    with workspace.weights_held():
        places = {a.dense(workspace).data_ptr(), b.dense(workspace).data_ptr()}
    a.packed.fill_(5)
    with workspace.weights_held():
        again = [a.dense(workspace), b.dense(workspace)]
    assert {x.data_ptr() for x in again} == places
    assert (again[0] == 5).all()
    assert (a.times, b.times) == (2, 2)


def test_what_exceeds_the_limit_is_dequantised_at_every_use() -> None:
    small, large = Source(1, (4, 8)), Source(2, (40, 8))
    workspace = Workspace(held_bytes=4 * 8 * 4)
    with workspace.weights_held():
        for _tile in range(2):
            held = small.dense(workspace)
            assert (large.dense(workspace) == 2).all()
            assert (held == 1).all(), "a held weight is not written over"
    assert (small.times, large.times) == (1, 2)


def test_a_weight_that_changes_inside_the_block_is_noticed() -> None:
    workspace, a = Workspace(), Source(1)
    with workspace.weights_held():
        a.dense(workspace)
        a.packed.fill_(3)
        with pytest.raises(AssertionError, match="written to"):
            a.dense(workspace)
    assert (a.dense(workspace) == 3).all(), "the block has ended"


def test_on_a_cpu_nothing_is_held() -> None:
    with weights_held(torch.device("cpu")), weights_held(torch.device("cpu")):
        pass
