"""A window over several processes against one process: losses and gradients of some steps, and bytes sent."""

from typing import Any

import pytest
import torch
from tests.exact_norms import exact_norms
from tests.parallel.forked import run_in_processes
from tests.tiny_models import VOCABULARY, tiny_model
from torch import Tensor, nn

from longfit.attention.hf_attention import attention_key
from longfit.engine.loss.training_loss import shifted_labels, training_loss
from longfit.engine.offload.activations import FileActivations
from longfit.engine.sweep.install import enable_sweep
from longfit.parallel.sequence import SequenceParallelLoss

STEPS = 5
TOLERANCE = 1e-12
"""float64: sums of at most some thousand products, added in another order, through two layers and five steps."""


def model_of(family: str, group_size: int | None, heads: tuple[int, int], tile: int | None, offload: bool) -> nn.Module:
    model = exact_norms(tiny_model(family, num_heads=heads[0], num_kv_heads=heads[1]))
    model.set_attn_implementation(attention_key("exact" if group_size is None else "shifted", group_size))
    enable_sweep(model, tile=tile, offload=FileActivations() if offload else None)
    return model


def batch_of(step: int, lengths: tuple[int, ...], batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(batch, -1)
    ids = torch.randint(3, VOCABULARY, positions.shape, generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def steps(model: nn.Module, loss_of: Any, lengths: tuple[int, ...], batch: int, *, reduce: bool) -> list[Any]:
    """Losses and gradients of some steps of gradient descent."""
    told = []
    for step in range(STEPS):
        inputs = batch_of(step, lengths, batch)
        targets = shifted_labels(inputs["input_ids"], inputs["labels"], inputs["position_ids"], None)
        loss = loss_of(model, **inputs, num_items=int((targets != -100).sum()))
        loss.backward()
        numbers = [loss.detach().clone(), *(p.grad for p in model.parameters())]
        if reduce:
            for number in numbers:
                torch.distributed.all_reduce(number)
        told.append([number.clone() for number in numbers])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return told


def share(rank: int, case: dict[str, Any]) -> Any:
    arguments = {**DEFAULTS, **case}
    model = model_of(arguments["family"], arguments["group_size"], arguments["heads"], arguments["tile"], rank == 1)
    loss_of = SequenceParallelLoss(torch.distributed.group.WORLD, balanced=arguments["group_size"] is None)
    return steps(model, loss_of, arguments["lengths"], arguments["batch"], reduce=True)[:: STEPS - 1]


def share_all(rank: int) -> dict[str, Any]:
    return {name: share(rank, case) for name, case in CASES.items()}


DEFAULTS: dict[str, Any] = {
    "family": "llama", "group_size": None, "heads": (6, 2), "tile": 8, "lengths": (64,), "batch": 1,
}  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "llama shifted": {"group_size": 16},
    "llama shifted, 9 heads on 3": {"group_size": 16, "heads": (9, 3)},
    "llama shifted, groups longer than a stretch": {"group_size": 64},
    "llama shifted, borders inside groups": {"group_size": 20, "lengths": (67,)},
    "llama shifted, documents": {"group_size": 16, "lengths": (5, 40, 1, 25), "batch": 2},
    "llama exact": {},
    "llama exact, documents over the border": {"lengths": (7, 30, 34), "batch": 2},
    "qwen3 shifted": {"family": "qwen3", "group_size": 16, "lengths": (61,)},
    "qwen3 exact": {"family": "qwen3", "heads": (9, 3)},
    "gemma3 shifted": {"family": "gemma3", "group_size": 16},
    "gemma3 exact": {"family": "gemma3", "lengths": (50, 13)},
}


@pytest.fixture(scope="module")
def together() -> dict[str, Any]:
    """What the first of two processes has found in all cases: starting processes costs more than a case."""
    found: dict[str, Any] = run_in_processes(share_all, 2)[0]
    return found


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_one_process(name: str, together: dict[str, Any]) -> None:
    arguments = {**DEFAULTS, **CASES[name]}
    model = model_of(arguments["family"], arguments["group_size"], arguments["heads"], arguments["tile"], False)
    alone = steps(model, training_loss, arguments["lengths"], arguments["batch"], reduce=False)[:: STEPS - 1]
    for before, after in zip(alone, together[name], strict=True):
        for expected, found in zip(before, after, strict=True):
            scale = expected.abs().max().clamp_min(1e-3)
            assert float((found - expected).abs().max() / scale) < TOLERANCE
