"""A run between its start and its end: what a step, an evaluation and a checkpoint need of it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from longfit.config import RunConfig
from longfit.data.packing import PackedDataset
from longfit.parallel.device_layout import DeviceLayout
from longfit.parallel.heartbeat import Heartbeat
from longfit.parallel.shard import Shards, whole_tensor
from longfit.planning.plan import Plan
from longfit.training import memory_check
from longfit.training.checkpoint import RunState, trained_tensors
from longfit.training.metrics import Event, MetricsFile, OnEvent, ignore
from longfit.training.optimizer import PagingMeter


@dataclass
class TrainingRun:
    """Everything a training step needs.

    Attributes:
        shards: what this process has of the trained parameters, where it has rows of them only.
        loss_of: the loss of a model and a batch, or of this process's part of the batch.
        loss_module: `TrainingLoss` around the PeftModel, as Accelerate wrapped it.
        model: the PeftModel.
        seconds: in training steps so far, those before a resumption counted.
    """

    config: RunConfig
    run_dir: Path
    notify: OnEvent
    accelerator: Accelerator
    layout: DeviceLayout
    heartbeat: Heartbeat | None
    shards: Shards | None
    loss_of: Any
    loss_module: Any
    model: Any
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    windows: PackedDataset
    validation: PackedDataset | None
    metrics: MetricsFile
    paging: PagingMeter
    plan: Plan | None
    step_down: memory_check.StepDown
    state: RunState
    seconds: float = 0.0

    @property
    def parameters(self) -> list[Tensor]:
        """Those that train."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        assert self.config.train.steps is not None, "resolved"
        return self.config.train.steps

    @cached_property
    def window_lengths(self) -> np.ndarray:
        """Tokens of each window, padding left out."""
        return self.windows.window_lengths

    @property
    def rank(self) -> int:
        """The number of this process."""
        return int(self.accelerator.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return bool(self.accelerator.is_main_process)

    def record(self, record: dict[str, Any]) -> None:
        """Write a line of ``metrics.jsonl``."""
        if self.is_main:
            self.metrics.append(record)

    def tell(self, event: Event) -> None:
        """Show something to who watches."""
        if self.is_main:
            try:
                self.notify(event)
            except OSError:  # the terminal has gone: nobody watches, the run goes on
                self.notify = ignore

    def over_processes(self, value: float) -> float:
        """Add up a number over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(total, reduction="sum").item())

    def over_windows(self, value: float) -> float:
        """Add up a number over all windows trained at once; those who share a window all know it, the first tells."""
        return self.over_processes(value if self.layout.stretch_of(self.rank) == 0 else 0)

    def whole_trained(self) -> dict[str, Tensor] | None:
        """The trained tensors of a sharded model, whole, in host memory; every process must call it. Else None."""
        if self.shards is None:
            return None
        return {name: whole_tensor(tensor.detach()).cpu() for name, tensor in trained_tensors(self.model).items()}
