"""Every way in which two or four processes share windows, tokens and weights, against one process: five steps of each.

Two packed documents of odd length lie over the borders; a step has four windows, so processes accumulate where fewer
are trained at once. Here four processes; ``benchmarks/sharing.py`` measures two and four, and keeps the numbers.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.exact_norms import exact_norms
from tests.parallel.forked import run_in_processes
from tests.parallel.test_sequence import batch_of
from tests.tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longfit.attention.hf_attention import attention_key
from longfit.engine.loss.training_loss import TrainingLoss, shifted_labels, training_loss
from longfit.engine.sweep.install import enable_sweep
from longfit.layers.experts import constants_of
from longfit.layers.linear4bit import Linear4bit
from longfit.model.adapters import register_layers
from longfit.model.pack_experts import compute_packed, pack, packable_experts, packed_parameters, store
from longfit.numerics.row_format import RowFormat
from longfit.parallel.device_layout import DeviceLayout
from longfit.parallel.sequence import SequenceParallelLoss, sequence_group
from longfit.parallel.shard import Shards, decoder_layers, mesh_of, shard_model, whole_tensor

PROCESSES, STEPS, WINDOWS = 4, 5, 4
LENGTHS = (37, 10)
RATE = 0.01
"""Of descent: large enough that a step changes the next loss, small enough that rounding is not amplified by it."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Of losses and of gradients: sums of at most some thousand products, added in another order, through two layers and
five steps. In float64 of the norm of each tensor, some thousand units in the last place; in float32 of that of the
whole gradient, eight units: a tensor whose terms cancel has their rounding (1.4e-6 of its own norm was the largest).
``benchmarks/sharing.py`` shows beside it what another order of addition does on one process (`another_tile`)."""


class Case(NamedTuple):
    """How the processes share, and what they train."""

    layout: DeviceLayout
    family: str = "llama"
    group_size: int | None = 16
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        kind = "exact" if self.group_size is None else "shifted"
        sizes = f"sequence {self.layout.sequence} shard {self.layout.shard}"
        return f"{self.family} {kind} {sizes} {str(self.dtype).removeprefix('torch.')}"


REPLICAS, SHARDS, HALVES = DeviceLayout(4, 1, 1), DeviceLayout(4, 1, 4), DeviceLayout(4, 1, 2)
ONE_WINDOW, TWO_WINDOWS = DeviceLayout(4, 4, 1), DeviceLayout(4, 2, 1)
SHARDED_WINDOW, SHARDED_WINDOWS = DeviceLayout(4, 4, 4), DeviceLayout(4, 2, 4)
CASES = [
    *(Case(layout) for layout in (REPLICAS, SHARDS, HALVES, ONE_WINDOW, TWO_WINDOWS, SHARDED_WINDOW, SHARDED_WINDOWS)),
    *(Case(layout, group_size=None) for layout in (ONE_WINDOW, TWO_WINDOWS, SHARDED_WINDOW, DeviceLayout(4, 2, 2))),
    *(Case(layout, "qwen3") for layout in (REPLICAS, SHARDS, SHARDED_WINDOW)),
    *(Case(layout, "qwen3", None) for layout in (ONE_WINDOW, SHARDED_WINDOWS)),
    *(Case(layout, "gemma3") for layout in (REPLICAS, SHARDS, SHARDED_WINDOW)),
    *(Case(layout, "gemma3", None) for layout in (ONE_WINDOW, SHARDED_WINDOWS)),
    Case(SHARDED_WINDOWS, "mixtral"),
    *(Case(layout, dtype=torch.float32) for layout in (REPLICAS, SHARDS, ONE_WINDOW, SHARDED_WINDOW)),
    *(Case(layout, group_size=None, dtype=torch.float32) for layout in (ONE_WINDOW, SHARDED_WINDOWS)),
]


def model_of(case: Case, *, tile: int = 12) -> Any:
    """A 4-bit base with adapters, norms and embeddings that train."""
    model: Any = tiny_model(case.family, num_heads=8, num_kv_heads=4, intermediate_size=96)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, Linear4bit.from_linear(module.float(), block_size=32))
    experts = pack_all(model)
    kind = "exact" if case.group_size is None else "shifted"
    model.set_attn_implementation(attention_key(kind, case.group_size))
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"] if experts else "all-linear",
        target_parameters=experts,
        modules_to_save=["input_layernorm", "embed_tokens"],
    )
    register_layers(config, model)
    torch.manual_seed(0)
    model = get_peft_model(model, config, autocast_adapter_dtype=False).to(case.dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    if case.dtype == torch.float64:
        exact_norms(model)
    enable_sweep(model, tile=tile)
    return model.train()


def pack_all(model: Any) -> list[str] | None:
    """Quantise stacked experts in place; their names for PEFT, if there are any."""

    def stored_as(linear: nn.Linear) -> Linear4bit:
        form = RowFormat(linear.out_features, linear.in_features, block_size=32)
        return Linear4bit.placeholder(form, bias=False, bias_dtype=torch.float64, device="meta")

    for path, module, names in list(packable_experts(model, {})):
        dense = {name: getattr(module, name).detach() for name in names}
        pack(module, names, stored_as)
        for name, weight in dense.items():
            rows, constants = store(module, f"{path}.{name}", weight).values()
            module.register_parameter(name, rows)
            module.packed.register_buffer(constants_of(name), constants)
    compute_packed(model)
    return [f"experts.{name}" for _, _, name, _ in packed_parameters(model)][:2] or None


class Learner(NamedTuple):
    """What a process calls: the loss, what passes but the last run in, and its tensors of the trained parameters."""

    model: Any
    loss: nn.Module
    no_sync: Callable[[], Any] = nullcontext
    collect: Callable[[], None] = lambda: None
    local: Callable[[Tensor], Tensor] = lambda parameter: parameter
    layout: DeviceLayout = DeviceLayout()
    rank: int = 0


def learner_of(case: Case, rank: int) -> Learner:
    model, layout = model_of(case), case.layout
    loss_of: Any = training_loss
    if layout.sequence > 1:
        group = sequence_group(layout.sharers_of_window(), rank)
        loss_of = SequenceParallelLoss(group, balanced=case.group_size is None)
    module: Any = TrainingLoss(model, loss=loss_of)
    if layout.shard == 1:
        module = DistributedDataParallel(module, broadcast_buffers=False)
        return Learner(model, module, module.no_sync, layout=layout, rank=rank)
    shard_model(module, decoder_layers(model), mesh_of(layout, torch.device("cpu")))
    shards = Shards([p for p in model.parameters() if p.requires_grad], num_devices=layout.devices)
    return Learner(model, module, nullcontext, shards.collect_gradients, shards.local, layout, rank)


def learn(learner: Learner) -> list[Tensor]:
    """Steps of gradient descent: this process's part of their losses, and the last gradients, whole."""
    losses, layout = [], learner.layout
    for step in range(STEPS):
        batches = [batch_of(WINDOWS * step + window, LENGTHS, 1) for window in range(WINDOWS)]
        count = sum(
            int((shifted_labels(b["input_ids"], b["labels"], b["position_ids"], None) != -100).sum()) for b in batches
        )
        own = range(layout.window_of(learner.rank), WINDOWS, layout.data)
        total = torch.zeros((), dtype=torch.float64)
        for window in own:
            with nullcontext() if window == own[-1] else learner.no_sync():
                loss = learner.loss(**batches[window], num_items=count)
                (loss * layout.devices).backward()
            total += loss.detach()
        learner.collect()
        losses.append(total)
        trained = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
        gradients = [whole_tensor(p.grad).clone() for p in trained] if step == STEPS - 1 else []
        with torch.no_grad():
            for parameter in trained:
                place = learner.local(parameter)
                if place.grad is not None:
                    place -= RATE * place.grad
                parameter.grad = place.grad = None
    return [*losses, *gradients]


class Off(NamedTuple):
    """Largest relative differences: of losses, of gradients of their tensors, and of them of the whole gradient."""

    loss: float
    tensor: float
    whole: float

    def of(self, dtype: torch.dtype) -> float:
        """What is held against the tolerance."""
        return max(self.loss, self.tensor if dtype == torch.float64 else self.whole)


def compare(expected: list[Tensor], found: list[Tensor]) -> Off:
    pairs = list(zip(expected, found, strict=True))
    whole = float(torch.cat([before.flatten() for before, _ in pairs[STEPS:]]).double().norm())
    apart = [float((before - after).double().norm()) for before, after in pairs]
    norms = [float(before.double().norm()) for before, _ in pairs]
    if not all(map(math.isfinite, apart)):
        return Off(math.inf, math.inf, math.inf)
    of_own = [off / norm if off else 0.0 for off, norm in zip(apart, norms, strict=True)]
    return Off(max(of_own[:STEPS]), max(of_own[STEPS:]), max(apart[STEPS:]) / whole)


def errors(rank: int, cases: list[Case], expected: dict[str, list[Tensor]]) -> list[Off]:
    """How far each case is off, as one process sees it."""
    worst = []
    for case in cases:
        found = learn(learner_of(case, rank))
        for loss in found[:STEPS]:
            torch.distributed.all_reduce(loss)
        worst.append(compare(expected[alone_of(case)], found))
    return worst


def another_tile(case: Case, expected: list[Tensor]) -> Off:
    """How far one process is off when its tiles are longer: the rounding of another order of addition."""
    model = model_of(case, tile=20)
    return compare(expected, learn(Learner(model, TrainingLoss(model))))


def learn_alone(cases: list[Case]) -> dict[str, list[Tensor]]:
    """What one process learns in each case, by `alone_of`; two are at it."""
    found: dict[str, list[Tensor]] = {}
    for share in run_in_processes(_learn_every_second, 2, list({alone_of(case): case for case in cases}.values())):
        found.update(share)
    return found


def _learn_every_second(rank: int, cases: list[Case]) -> dict[str, list[Tensor]]:
    models = {alone_of(case): model_of(case) for case in cases[rank::2]}
    return {name: learn(Learner(model, TrainingLoss(model))) for name, model in models.items()}


def alone_of(case: Case) -> str:
    return str(case._replace(layout=DeviceLayout()))


@pytest.fixture(scope="module")
def measured() -> list[list[Off]]:
    return run_in_processes(errors, PROCESSES, CASES, learn_alone(CASES))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_four_processes_learn_what_one_learns(number: int, measured: list[list[Off]]) -> None:
    dtype = CASES[number].dtype
    assert max(of_rank[number].of(dtype) for of_rank in measured) < TOLERANCE[dtype]
