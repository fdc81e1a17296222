"""Which windows a step trains on, stacked for the device: a function of the step's place in the run alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.data.packing import PackedDataset
from longfit.engine.loss.training_loss import shifted_labels
from longfit.numerics.labels import IGNORED
from longfit.training.training_run import TrainingRun


@dataclass(frozen=True)
class Batch:
    """Some windows, stacked, on the device: ``input_ids``, ``position_ids`` and ``labels``, each ``[B, T]``."""

    indices: list[int]
    tensors: dict[str, Tensor]


def window_indices(run: TrainingRun, window: int) -> Iterator[list[int]]:
    """Yield the windows of each micro-batch of this step, of the ``window``-th of those that are trained at once.

    The whole run walks `PackedDataset.order`.
    """
    train = run.config.train
    first = run.state.windows_seen
    for number in range(train.gradient_accumulation):
        share = number * run.layout.data + window
        positions = range(first + share * train.batch_size, first + (share + 1) * train.batch_size)
        yield [int(run.windows.order(p // len(run.windows))[p % len(run.windows)]) for p in positions]


def make_batch(run: TrainingRun, indices: list[int], *, windows: PackedDataset | None = None) -> Batch:
    rows = [(windows or run.windows)[index] for index in indices]
    device = run.accelerator.device
    return Batch(indices, {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]})


def count_trained(batch: Batch) -> int:
    """Count the tokens a batch is trained on: the labels that count once they are shifted."""
    tensors = batch.tensors
    targets = shifted_labels(tensors["input_ids"], tensors["labels"], tensors["position_ids"], None)
    return int((targets != IGNORED).sum())
