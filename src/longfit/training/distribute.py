"""What several processes change of a run: how they join, what wraps the model, what they refuse.

Replicas are torch's DistributedDataParallel, through Accelerate; shards are FSDP2 (``parallel/shard.py``); a shared
window is a loss that knows its part (``parallel/sequence.py``). They go together in any way, because the gradients of
all processes are averaged whatever each of them had, and every loss is multiplied by their number.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.distributed.device_mesh import DeviceMesh

from longfit.config import RunConfig
from longfit.engine.loss.training_loss import TrainingLoss, training_loss
from longfit.errors import ConfigError, RunError
from longfit.parallel.device_layout import DeviceLayout
from longfit.parallel.processes import exchange_timeout
from longfit.parallel.sequence import SequenceParallelLoss, require_shareable, sequence_group
from longfit.parallel.shard import Shards, decoder_layers, shard_model
from longfit.training.checkpoint import RunState
from longfit.training.metrics import Event, OnEvent
from longfit.training.optimizer import parameter_groups


def make_accelerator(device: str, *, timeout: float) -> Accelerator:
    """Join the processes of the run, if there are several, on the device that the run asks for.

    Raises: ConfigError: there is no such device.
    """
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ConfigError(f"model.device={device}: this machine has no CUDA device; try model.device=cpu")
        if ":" in device:
            torch.cuda.set_device(torch.device(device))
    elif device not in ("auto", "cpu"):
        raise ConfigError(f"model.device={device}: must be auto, cpu, cuda or cuda:N")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    handlers = [
        InitProcessGroupKwargs(timeout=exchange_timeout(timeout, on_cpu=on_cpu)),
        DistributedDataParallelKwargs(broadcast_buffers=False),  # rotary tables and block constants never change
    ]
    # Layers compute in model.dtype by themselves.
    return Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)


def choose_loss(model: Any, config: RunConfig, layout: DeviceLayout, accelerator: Accelerator) -> Any:
    """Return the loss of a model and a batch, or of this process's part of the batch.

    Raises: ModelError: the model's layers cannot share a window.
    """
    if layout.sequence == 1:
        return training_loss
    require_shareable(model, engine=config.engine.engine)
    group = sequence_group(layout.sharers_of_window(), accelerator.process_index)
    return SequenceParallelLoss(group, balanced=config.context.attention == "exact")


def wrap(
    model: Any, loss_of: Any, config: RunConfig, accelerator: Accelerator, mesh: DeviceMesh | None
) -> tuple[Any, list[dict[str, Any]], Shards | None]:
    """Make the module that trains, as the processes share it.

    Args:
        mesh: of the devices that share the weights; None where each has all of them.
    Returns: the module whose forward is the loss; the optimiser's groups; what this process has of the trained
        parameters, None where it has them whole.
    """
    module: Any = TrainingLoss(model, engine=config.engine.engine, loss=loss_of)
    if mesh is None:
        module = accelerator.prepare(module).train()
        return module, parameter_groups(model, weight_decay=config.train.weight_decay), None
    shard_model(module, decoder_layers(model), mesh)
    groups = parameter_groups(model, weight_decay=config.train.weight_decay)
    shards = Shards([p for group in groups for p in group["params"]], num_devices=accelerator.num_processes)
    return module.train(), shards.groups(groups), shards


def same_windows(config: RunConfig, state: RunState, layout: DeviceLayout, notify: OnEvent) -> RunConfig:
    """Keep the windows of a step when a run goes on with more or fewer of them at once.

    Raises: RunError: they cannot be divided so.
    """
    windows = state.num_processes * (state.gradient_accumulation or config.train.gradient_accumulation)
    if windows % layout.data:
        raise RunError(
            f"cannot resume with {layout.data} windows at once: a step of this run has {windows} x train.batch_size"
            f" windows; take a divisor of {windows} as parallel.data, such as {state.num_processes}"
        )
    if layout.data != state.num_processes:
        told = f"{layout.data} windows at once instead of {state.num_processes}: losses may differ in rounding"
        notify(Event("warning", told))
    return config.replace({"train.gradient_accumulation": windows // layout.data}, origin="resume")


def require_shardable(config: RunConfig) -> None:
    """Refuse what needs whole weights or a state that cannot be cut into rows.

    Raises: ConfigError: naming the setting and what works.
    """
    refused = {
        "engine.stream": (config.engine.stream != "none", "shards are gathered, not streamed; use none"),
        "optim.optim": (config.optim.optim == "adamw8bit", "8-bit blocks cross the rows of shards; use adamw"),
        "optim.file": (config.optim.file is not None, "a file belongs to one division into shards; drop it"),
        "adapter.train_new_tokens": (
            config.adapter.train_new_tokens,
            "rows of a sharded table do not train alone; false",
        ),
        "adapter.start": (
            config.adapter.start != "standard",
            "what rounding lost is found on whole weights; standard",
        ),
        "model.dtype": (
            config.model.dtype == "float16",
            "losses are not scaled there; use bfloat16 or float32",
        ),
    }
    problems = [f"{key}={config.flat()[key]} with parallel.shard: {why}" for key, (bad, why) in refused.items() if bad]
    if problems:
        raise ConfigError("\n  ".join(problems))
