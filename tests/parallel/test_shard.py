"""What a process holds and gathers of sharded weights (FSDP2); what they learn is in ``test_combinations.py``."""

from typing import Any

import pytest
import torch.distributed as dist
from tests.parallel.forked import run_in_processes
from tests.parallel.test_combinations import Case, learner_of
from tests.parallel.test_sequence import batch_of

from longfit.compat.torch_distributed import local_part
from longfit.parallel.device_layout import DeviceLayout

TILES = 6  # of 12 tokens


def hold_and_gather(rank: int, case: Case) -> tuple[float, list[int]]:
    """The share of all bytes that a process holds, and gathers in each of two passes, forward and in all."""
    learner = learner_of(case, rank)
    own, whole = (sum(part(p).nbytes for p in learner.model.parameters()) for part in (local_part, lambda p: p))
    gathers = 0
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # by torch's version
    original = getattr(dist, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal gathers
        gathers += 1
        return original(*args, **kwargs)

    setattr(dist, name, counted)
    told = []
    for _ in range(2):
        gathers = 0
        loss = learner.loss(**batch_of(rank, (63,), 1), num_items=62)
        told.append(gathers)
        loss.backward()
        told.append(gathers)
    setattr(dist, name, original)
    return own / whole, told


@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_holds_its_share_and_gathers_a_layer_once_in_each_direction(processes: int) -> None:
    case = Case(DeviceLayout(processes, 1, processes))
    told = run_in_processes(hold_and_gather, processes, case)
    assert sum(share for share, _ in told) == pytest.approx(1)  # nothing is held twice
    assert max(share for share, _ in told) < 1.04 / processes  # of 97 rows, four processes have 25, 25, 25 and 22
    for _, gathers in told:
        layers, outside = 2, 1
        assert gathers == [layers + outside, 2 * layers + outside] * 2
        assert gathers[1] < layers * TILES
