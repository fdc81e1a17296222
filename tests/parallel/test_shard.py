"""What a process holds and gathers of sharded weights (FSDP2); what they learn is in ``test_combinations.py``."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.parallel.forked import run_in_processes
from tests.parallel.test_combinations import Case, learner_of, model_of
from tests.parallel.test_sequence import batch_of

from longfit.compat.torch_distributed import local_part
from longfit.engine.loss.training_loss import TrainingLoss
from longfit.optim.adamw import PagedAdamW
from longfit.parallel.device_layout import DeviceLayout
from longfit.parallel.shard import Shards, decoder_layers, mesh_of, own_state, shard_model, whole_state

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


def save_and_load(rank: int, case: Case) -> tuple[int, Any, Any]:
    """Take a step; return how many parameters this process has no row of, and the state, saved and saved again."""
    model = model_of(case)
    module = TrainingLoss(model)
    shard_model(module, decoder_layers(model), mesh_of(case.layout, torch.device("cpu")))
    shards = Shards([p for p in model.parameters() if p.requires_grad], num_devices=case.layout.devices)
    local = [shards.local(parameter) for parameter in shards.parameters]
    module(**batch_of(rank, (63,), 1), num_items=62).backward()
    shards.collect_gradients()
    optimizer, other = PagedAdamW(local, lr=0.01), PagedAdamW(local, lr=0.01)
    optimizer.step()
    saved = whole_state(optimizer.state_dict(), shards.parameters)
    other.load_state_dict(own_state(saved, shards.parameters))
    again = whole_state(other.state_dict(), shards.parameters)
    shapes = [tuple(parameter.shape) for parameter in shards.parameters]
    for number, fields in saved["state"].items():
        assert fields["exp_avg"].shape == shapes[number]
    return sum(part.numel() == 0 for part in local), saved["state"], again["state"]


def test_processes_without_a_row_of_an_adapter_take_part_in_saving_it() -> None:
    """Adapters of rank 4 on three processes: two rows, two rows, none."""
    told = run_in_processes(save_and_load, 3, Case(DeviceLayout(3, 1, 3), dtype=torch.float32))
    assert [empty > 0 for empty, _, _ in told] == [False, False, True]
    _, saved, _ = told[0]
    assert len(saved) > 4
    for _, *states in told:
        for state in states:
            assert state.keys() == saved.keys()
            for number, fields in saved.items():
                assert fields.keys() == state[number].keys()
                assert all(torch.equal(torch.as_tensor(fields[k]), torch.as_tensor(state[number][k])) for k in fields)
