"""What a run does before its first step: everything that can fail before anything is written.

Read the text, plan the memory, load and quantise the model, pack, extend, adapt; then make the run directory, or open
that of the run that goes on.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from longfit.config import RunConfig
from longfit.data.ledger import Ledger
from longfit.data.packing import PackedDataset
from longfit.engine.sweep.attention_choice import take_exact_attention
from longfit.errors import ConfigError, ModelError, RunError
from longfit.files.reading import reading
from longfit.model import weight_files
from longfit.model.family import understand
from longfit.model.load import load_report
from longfit.model.own_rows import OwnRows
from longfit.parallel.agreement import require_agreement, versions
from longfit.parallel.device_layout import DeviceLayout, choose_layout
from longfit.parallel.heartbeat import Heartbeat
from longfit.parallel.processes import start_heartbeat
from longfit.parallel.shard import Shards, mesh_of
from longfit.planning.plan import Plan
from longfit.training import loss_scale, memory_check, run_directory
from longfit.training.best import require_validation
from longfit.training.checkpoint import (
    RunState,
    list_checkpoints,
    load_checkpoint,
    newest_sound,
    num_bytes,
    read_state,
    require_disk_room,
    set_aside,
    trained_tensors,
)
from longfit.training.distribute import choose_loss, make_accelerator, require_shardable, same_windows, wrap
from longfit.training.metrics import Event, MetricsFile, OnEvent, ignore, read_metrics
from longfit.training.optimizer import PagingMeter, make_optimizer
from longfit.training.prepare import (
    extend,
    load_base,
    make_trainable,
    native_context,
    num_shared,
    pack_documents,
    read_data,
    remember_chat,
    resolve_date,
    resolve_dtype,
    stream_frozen,
    sweep_with_less,
)
from longfit.training.samples import keep_samples_until
from longfit.training.trackers import missing
from longfit.training.warm_start import find_initial_adapter, warm_start


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


def start(config: RunConfig, run_dir: Path, notify: OnEvent, *, resume: bool) -> TrainingRun:
    """Do everything that can fail before anything is written: read, load, pack; then make or open the run directory."""
    accelerator = make_accelerator(config.model.device, timeout=config.parallel.timeout)
    run_dir = Path(_same_everywhere(accelerator, str(run_dir)))
    heartbeat = start_heartbeat(timeout=config.parallel.timeout)
    try:
        return _start(config, run_dir, notify, accelerator, heartbeat, resume=resume)
    except BaseException:
        if heartbeat is not None:
            heartbeat.stop()
        raise


def _start(
    config: RunConfig,
    run_dir: Path,
    notify: OnEvent,
    accelerator: Accelerator,
    heartbeat: Heartbeat | None,
    *,
    resume: bool,
) -> TrainingRun:
    parallel = config.parallel
    layout = choose_layout(
        accelerator.num_processes,
        asked=parallel.devices,
        data=parallel.data,
        sequence=parallel.sequence,
        shard=parallel.shard,
    )
    notify = notify if accelerator.is_main_process else ignore
    if layout.devices > 1:
        notify(Event("phase", str(layout)))
    notify(Event("phase", f"reading {config.data.path}"))
    documents, held_out = read_data(config, on_event=notify)
    config = resolve_date(config, documents)
    train = config.train
    require_validation(keep_best=train.keep_best, patience=train.patience, has_validation=held_out is not None)
    if config.adapter.init is not None and not resume:
        find_initial_adapter(config.adapter.init)
    require_trackers(config.output.track)
    if held_out is None:
        offer = "no validation text: learning by heart would not show; data.validation_fraction=0.05 holds some out"
        notify(Event("phase", offer))
    digest = run_directory.data_digest(training=documents, validation=held_out)
    require_agreement({**versions(), **_settings(config), **_data(digest)})
    fingerprints = weight_files.fingerprints(config.model.name)
    identity = run_directory.Identity(_same_everywhere(accelerator, new_run_id()), layout.data, fingerprints)
    sound: tuple[Path | None, list[str]] = (None, [])
    if resume:
        identity = run_directory.require_own_files(run_dir)
        run_directory.require_same_model(run_dir, identity.model, fingerprints)
        run_directory.require_same_data(run_dir, digest)
        sound = newest_sound(run_dir)
        begun = RunState(0, 0, 0, num_processes=identity.num_processes)
        config = same_windows(config, begun if sound[0] is None else read_state(sound[0]), layout, notify)
    if layout.shard > 1:
        require_shardable(config)
    config = resolve_dtype(config, accelerator.device, on_event=notify)
    config, plan = memory_check.plan_run(
        config,
        run_dir,
        device=accelerator.device,
        on_event=notify,
        processes=accelerator.num_processes,
        parallelism=accelerator.distributed_type.value,
    )
    notify(Event("phase", f"loading {config.model.name}"))
    mesh = mesh_of(layout, accelerator.device) if layout.shard > 1 else None
    own_rows = OwnRows(mesh) if mesh is not None and config.model.quant != "none" else None
    model, tokenizer = load_base(config, accelerator.device, own_rows=own_rows)
    for line in str(load_report(model)).splitlines():
        notify(Event("phase", line))
    native = native_context(model.config)
    config = config.resolve(native_context=native)
    with reading(config.model.name, "the model", ModelError, do="give another model (--debug shows where it failed)"):
        report = extend(model, tokenizer, config)
    if report.group_size != config.context.group_size:
        origin = "auto: a quarter of the context (LongLoRA, section 3.2)"
        config = config.replace({"context.group_size": report.group_size}, origin=origin)
    notify(Event("phase", "packing the text into windows"))
    family = understand(model, nature=take_exact_attention(model))
    family.require_trainable()
    if family.packs is not None:
        notify(Event("phase", f"one document a window: {family.packs}", {"mixing": family.packs}))
    alone = family.packs is not None
    windows = pack_documents(documents, tokenizer, config, alone=alone, on_event=notify)
    validation = pack_documents(held_out, tokenizer, config, alone=alone) if held_out is not None else None
    remember_chat(model, tokenizer, windows)
    ledger = Ledger.of(
        windows,
        native_context=native,
        report=documents.report,
        tokenizer=tokenizer,
        num_validation_seen=num_shared(held_out, documents),
    )
    config = config.resolve_steps(num_windows=len(windows), num_processes=layout.data)

    model = make_trainable(model, config, on_event=notify)
    if config.adapter.init is not None and not resume:
        notify(Event("phase", str(warm_start(model, config.adapter.init))))
    loss_of = choose_loss(model, config, layout, accelerator)
    if own_rows is not None:
        own_rows.release()
    loss_module, groups, shards = wrap(model, loss_of, config, accelerator, mesh)
    stream_frozen(model, config, accelerator.device, on_event=notify)
    optimizer = make_optimizer(
        config,
        groups,
        run_id=identity.run_id,
        process=accelerator.process_index if accelerator.num_processes > 1 else None,
    )
    if accelerator.is_main_process:
        trained = trained_tensors(model)
        moments = (2 if config.optim.optim == "adamw8bit" else 8) * sum(tensor.numel() for tensor in trained.values())
        require_disk_room(
            run_dir,
            trained=num_bytes(trained),
            state=moments,
            keep=config.train.keep_checkpoints,
            best=config.train.keep_best and held_out is not None,
        )
    metrics = MetricsFile(run_dir / "metrics.jsonl")
    scale, seconds = loss_scale.first_scale(model.get_input_embeddings().weight.dtype), 0.0
    state = RunState(0, 0, 0, num_processes=layout.data, run_id=identity.run_id, loss_scale=scale)
    if resume:
        state = _go_on(
            run_dir,
            metrics,
            state,
            sound=sound,
            model=model,
            optimizer=optimizer,
            shards=shards,
            accelerator=accelerator,
            notify=notify,
        )
        seconds = sum(float(str(record["step_s"])) for record in read_metrics(metrics.path) if "step_s" in record)
    accelerator.wait_for_everyone()  # every process has seen the directory as it was
    if not resume and accelerator.is_main_process:
        run_directory.create(run_dir, config, identity=identity, digest=digest, ledger=ledger, training=documents)
    if accelerator.is_main_process:
        run_directory.write_family(run_dir, family.to_json())
    if plan is not None and accelerator.is_main_process:
        run_directory.write_plan(run_dir, memory_check.plan_json(plan))
    scaling = loss_scale.describe(state.loss_scale, on_card=config.origin("model.dtype").startswith("auto"))
    for line in ledger.notes:
        notify(Event("phase", f"note: {line}"))
    for line in (*ledger.warnings, *report.warnings, *([scaling] if scaling else [])):
        notify(Event("warning", line))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    steps = f"{config.train.steps:,} steps" if not state.step else f"steps {state.step + 1:,} to {config.train.steps:,}"
    text = f"training {trainable:,} parameters for {steps} on {len(windows):,} windows of {windows.context:,} tokens"
    notify(Event("phase", text, {"total_steps": config.train.steps, "step": state.step, "run_dir": str(run_dir)}))
    step_down = memory_check.StepDown(
        plan,
        lambda suggestion: sweep_with_less(
            model, config.replace(memory_check.keys_of(suggestion), origin="out of memory")
        ),
        notify,
    )
    return TrainingRun(
        config, run_dir, notify, accelerator, layout, heartbeat, shards, loss_of, loss_module, model, tokenizer,
        optimizer, windows, validation, metrics, PagingMeter(optimizer), plan, step_down, state, seconds,
    )  # fmt: skip


def _settings(config: RunConfig) -> dict[str, object]:
    """Every setting that decides what is computed, by the name that the user knows."""
    return {key: value for key, value in config.flat().items() if key != "model.device"}


def _data(digest: dict[str, dict[str, str]]) -> dict[str, object]:
    return {f"{part} data {name}": value for part, files in digest.items() for name, value in files.items()}


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that is not installed."""
    lacking = missing(names)
    if lacking:
        raise ConfigError(
            f"output.track: {', '.join(lacking)} is not installed; pip install {' '.join(lacking)}"
            " (or 'longfit[track]' for tensorboard and trackio), or drop it"
        )


def new_run_id() -> str:
    """Return a name that no other run has."""
    return os.urandom(8).hex()


def _same_everywhere(accelerator: Accelerator, text: str) -> str:
    """Return the text of the first process in all processes."""
    texts = [text]
    if accelerator.num_processes > 1:
        broadcast_object_list(texts)
    return texts[0]


def _go_on(
    run_dir: Path,
    metrics: MetricsFile,
    start: RunState,
    *,
    sound: tuple[Path | None, list[str]],
    model: Any,
    optimizer: torch.optim.Optimizer,
    shards: Shards | None,
    accelerator: Accelerator,
    notify: OnEvent,
) -> RunState:
    """Take up the newest checkpoint that is sound, or the start of a run that was stopped before its first one.

    Args:
        sound: from `newest_sound`.
    Returns: where the run stands.
    Raises: RunError: there are checkpoints, and every one is damaged.
    """
    checkpoint, damaged = sound
    accelerator.wait_for_everyone()  # every process has seen the checkpoints as they were
    if checkpoint is None and damaged:
        raise RunError("\n  ".join([f"cannot resume {run_dir}: no checkpoint is sound", *damaged]))
    if accelerator.is_main_process:
        for folder, problem in zip(reversed(list_checkpoints(run_dir)), damaged, strict=False):
            text = f"{problem}; it is kept as {set_aside(folder).name}, the run goes on from {checkpoint}"
            notify(Event("warning", text))
        if not metrics.restore(None if checkpoint is None else checkpoint / "metrics.jsonl"):
            notify(Event("warning", f"{metrics.path}: was removed or changed; restored from {checkpoint}"))
        keep_samples_until(run_dir / "samples.jsonl", start.step if checkpoint is None else read_state(checkpoint).step)
    accelerator.wait_for_everyone()
    if checkpoint is None:
        notify(Event("warning", f"{run_dir}: nothing was saved yet; the run starts from the beginning"))
        return start
    return load_checkpoint(checkpoint, model=model, optimizer=optimizer, device=accelerator.device, shards=shards)
