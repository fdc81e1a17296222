"""What a run does before its first step: everything that can fail before anything is written.

Read the text, plan the memory, load and quantise the model, pack, extend, adapt; then make the run directory, or open
that of the run that goes on.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from longfit.config import RunConfig
from longfit.data.documents import Documents
from longfit.data.ledger import Ledger
from longfit.data.packing import PackedDataset
from longfit.engine.sweep.attention_choice import take_exact_attention
from longfit.errors import ConfigError, ModelError, RunError
from longfit.files.reading import reading
from longfit.model import weight_files
from longfit.model.adapter_start import require_start
from longfit.model.family import Family, understand
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
from longfit.training.computed_with import computed_with, told_change
from longfit.training.distribute import choose_loss, make_accelerator, require_shardable, same_windows, wrap
from longfit.training.metrics import Event, MetricsFile, OnEvent, ignore, read_metrics
from longfit.training.optimizer import PagingMeter, make_optimizer
from longfit.training.prepare import (
    extend,
    load_base,
    make_trainable,
    remember_chat,
    resolve_dtype,
    stream_frozen,
    sweep_with_less,
)
from longfit.training.prepare_data import native_context, num_shared, pack_documents, read_data, resolve_date
from longfit.training.same_run import data_digest, require_same_data, require_same_model
from longfit.training.samples import keep_samples_until
from longfit.training.trackers import require_trackers
from longfit.training.training_run import TrainingRun
from longfit.training.warm_start import find_initial_adapter, warm_start


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


@dataclass(frozen=True)
class _Here:
    """Where a run is computed, where it is written, and who is told of it."""

    accelerator: Accelerator
    layout: DeviceLayout
    run_dir: Path
    notify: OnEvent
    resume: bool

    def say(self, text: str, **data: object) -> None:
        self.notify(Event("phase", text, data))


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
    here = _Here(accelerator, layout, run_dir, notify if accelerator.is_main_process else ignore, resume)
    if layout.devices > 1:
        here.say(str(layout))
    config, documents, held_out = _read(config, here)
    origin = _origin(config, here, documents, held_out)
    config, plan = _settle(config, here, origin)
    config, base = _load(config, here, begins=origin.sound[0] is None)
    config, packed = _pack(config, here, base, documents, held_out)
    trained = _make_trained(config, here, base, origin)
    if accelerator.is_main_process:
        _require_disk_room(config, here, trained.model, has_validation=held_out is not None)
    metrics = MetricsFile(run_dir / "metrics.jsonl")
    state, seconds = _first_state(here, origin, trained, metrics)
    accelerator.wait_for_everyone()  # every process has seen the directory as it was
    if accelerator.is_main_process:
        if not resume:
            run_directory.create(
                run_dir,
                config,
                identity=origin.identity,
                digest=origin.digest,
                ledger=packed.ledger,
                training=documents,
            )
        run_directory.write_family(run_dir, packed.family.to_json())
        if plan is not None:
            run_directory.write_plan(run_dir, memory_check.plan_json(plan))
    _announce(config, here, base, packed, trained.model, state)
    model = trained.model
    step_down = memory_check.StepDown(
        plan,
        lambda suggestion: sweep_with_less(
            model, config.replace(memory_check.keys_of(suggestion), origin="out of memory")
        ),
        here.notify,
    )
    return TrainingRun(
        config, run_dir, here.notify, accelerator, layout, heartbeat, trained.shards, trained.loss_of,
        trained.loss_module, model, base.tokenizer, trained.optimizer, packed.windows, packed.validation, metrics,
        PagingMeter(trained.optimizer), plan, step_down, state, seconds,
    )  # fmt: skip


def _read(config: RunConfig, here: _Here) -> tuple[RunConfig, Documents, Documents | None]:
    """Read the texts, and refuse what they and the settings cannot do together."""
    here.say(f"reading {config.data.path}")
    documents, held_out = read_data(config, on_event=here.notify)
    config = resolve_date(config, documents)
    train = config.train
    require_validation(keep_best=train.keep_best, patience=train.patience, has_validation=held_out is not None)
    if config.adapter.init is not None and not here.resume:
        find_initial_adapter(config.adapter.init)
    require_start(config.adapter.start, quant=config.model.quant)
    require_trackers(config.output.track)
    if held_out is None:
        ways = "data.validation=FILE names one"
        if len(documents) > 1:
            ways += ", data.validation_fraction=0.05 holds some documents out"
        here.say(f"no validation text: learning by heart would not show; {ways}")
    return config, documents, held_out


@dataclass(frozen=True)
class _Origin:
    """What a run is made from, and where one that goes on stands.

    Attributes:
        digest: of the texts, file by file.
        sound: from `newest_sound`; nothing for a new run.
    """

    identity: run_directory.Identity
    digest: dict[str, dict[str, str]]
    sound: tuple[Path | None, list[str]]


def _origin(config: RunConfig, here: _Here, documents: Documents, held_out: Documents | None) -> _Origin:
    """Know the run by its texts and its base model, the same in all processes and, resuming, as before."""
    digest = data_digest(training=documents, validation=held_out)
    require_agreement({**versions(), **_settings(config), **_data(digest)})
    fingerprints = weight_files.fingerprints(config.model.name)
    if not here.resume:
        run_id = _same_everywhere(here.accelerator, run_directory.new_run_id())
        return _Origin(run_directory.Identity(run_id, here.layout.data, fingerprints), digest, (None, []))
    identity = run_directory.require_own_files(here.run_dir)
    require_same_model(here.run_dir, identity.model, fingerprints)
    require_same_data(here.run_dir, digest)
    return _Origin(identity, digest, newest_sound(here.run_dir))


def _settle(config: RunConfig, here: _Here, origin: _Origin) -> tuple[RunConfig, Plan | None]:
    """Settle what depends on the devices: the windows trained at once, the dtype, what fits the memory."""
    if here.resume:
        checkpoint = origin.sound[0]
        begun = RunState(0, 0, 0, num_processes=origin.identity.num_processes)
        begun = begun if checkpoint is None else read_state(checkpoint)
        config = same_windows(config, begun, here.layout, here.notify)
    if here.layout.shard > 1:
        require_shardable(config)
    config = resolve_dtype(config, here.accelerator.device, on_event=here.notify)
    return memory_check.plan_run(
        config,
        here.run_dir,
        device=here.accelerator.device,
        on_event=here.notify,
        processes=here.accelerator.num_processes,
        parallelism=here.accelerator.distributed_type.value,
        resumes=here.resume,
    )


@dataclass(frozen=True)
class _Base:
    """The base model, extended to the run's context.

    Attributes:
        native: its context before.
        mesh, own_rows: of a model of which each process loads its own rows.
    """

    model: Any
    tokenizer: Any
    native: int
    warnings: tuple[str, ...]
    mesh: Any
    own_rows: OwnRows | None


def _load(config: RunConfig, here: _Here, *, begins: bool) -> tuple[RunConfig, _Base]:
    """Load and quantise the base model and extend its context.

    Args:
        begins: whether no checkpoint holds the adapters yet.
    """
    device = here.accelerator.device
    if config.adapter.train_new_tokens and config.engine.stream != "none":
        raise ConfigError("adapter.train_new_tokens: the embedding must stay in its place; drop engine.stream")
    here.say(f"loading {config.model.name}")
    mesh = mesh_of(here.layout, device) if here.layout.shard > 1 else None
    own_rows = OwnRows(mesh) if mesh is not None and config.model.quant != "none" else None
    model, tokenizer = load_base(config, device, own_rows=own_rows, begins=begins)
    for line in str(load_report(model)).splitlines():
        here.say(line)
    native = native_context(model.config)
    config = config.resolve(native_context=native)
    with reading(config.model.name, "the model", ModelError, do="give another model (--debug shows where it failed)"):
        report = extend(model, tokenizer, config)
    if report.group_size != config.context.group_size:
        origin = "auto: a quarter of the context (LongLoRA, section 3.2)"
        config = config.replace({"context.group_size": report.group_size}, origin=origin)
    return config, _Base(model, tokenizer, native, tuple(report.warnings), mesh, own_rows)


@dataclass(frozen=True)
class _Packed:
    """The texts as windows of tokens, and the account of them."""

    family: Family
    windows: PackedDataset
    validation: PackedDataset | None
    ledger: Ledger


def _pack(
    config: RunConfig, here: _Here, base: _Base, documents: Documents, held_out: Documents | None
) -> tuple[RunConfig, _Packed]:
    """Pack the texts into windows, as far as the model keeps packed documents apart."""
    here.say("packing the text into windows")
    family = understand(base.model, nature=take_exact_attention(base.model))
    family.require_trainable()
    mixing = family.mixing(config.engine.engine)
    alone = mixing is not None
    if alone:
        here.say(f"one document a window: {mixing}", mixing=mixing)
    windows = pack_documents(documents, base.tokenizer, config, alone=alone, on_event=here.notify)
    validation = pack_documents(held_out, base.tokenizer, config, alone=alone) if held_out is not None else None
    remember_chat(base.model, base.tokenizer, windows)
    ledger = Ledger.of(
        windows,
        native_context=base.native,
        report=documents.report,
        tokenizer=base.tokenizer,
        num_validation_seen=num_shared(held_out, documents),
    )
    config = config.resolve_steps(num_windows=len(windows), num_processes=here.layout.data)
    return config, _Packed(family, windows, validation, ledger)


@dataclass(frozen=True)
class _Trained:
    """The model with its adapters, wrapped for its devices, and what trains it; see `TrainingRun`."""

    model: Any
    loss_of: Any
    loss_module: Any
    shards: Shards | None
    optimizer: torch.optim.Optimizer


def _make_trained(config: RunConfig, here: _Here, base: _Base, origin: _Origin) -> _Trained:
    """Add the adapters, wrap the model for its devices, and make the optimiser."""
    accelerator = here.accelerator
    model = make_trainable(base.model, config, on_event=here.notify)
    if config.adapter.init is not None and origin.sound[0] is None:  # a killed run may have no checkpoint to go on from
        here.say(str(warm_start(model, config.adapter.init)))
    loss_of = choose_loss(model, config, here.layout, accelerator)
    if base.own_rows is not None:
        base.own_rows.release()
    loss_module, groups, shards = wrap(model, loss_of, config, accelerator, base.mesh)
    stream_frozen(model, config, accelerator.device, on_event=here.notify)
    process = accelerator.process_index if accelerator.num_processes > 1 else None
    optimizer = make_optimizer(config, groups, run_id=origin.identity.run_id, process=process)
    return _Trained(model, loss_of, loss_module, shards, optimizer)


def _require_disk_room(config: RunConfig, here: _Here, model: Any, *, has_validation: bool) -> None:
    trained = trained_tensors(model)
    moments = (2 if config.optim.optim == "adamw8bit" else 8) * sum(tensor.numel() for tensor in trained.values())
    require_disk_room(
        here.run_dir,
        trained=num_bytes(trained),
        state=moments,
        keep=config.train.keep_checkpoints,
        best=config.train.keep_best and has_validation,
    )


def _first_state(here: _Here, origin: _Origin, trained: _Trained, metrics: MetricsFile) -> tuple[RunState, float]:
    """Where the run begins, or goes on, and the seconds that its steps have taken so far."""
    scale = loss_scale.first_scale(trained.model.get_input_embeddings().weight.dtype)
    begun = RunState(
        0, 0, 0, num_processes=here.layout.data, run_id=origin.identity.run_id, loss_scale=scale,
        computed_with=computed_with(),
    )  # fmt: skip
    if not here.resume:
        return begun, 0.0
    state = _go_on(here, metrics, begun, origin.sound, trained)
    return state, sum(float(str(record["step_s"])) for record in read_metrics(metrics.path) if "step_s" in record)


def _announce(config: RunConfig, here: _Here, base: _Base, packed: _Packed, model: Any, state: RunState) -> None:
    """Say what is about to be trained, and what the user should know of the data and the model before."""
    for line in packed.ledger.notes:
        here.say(f"note: {line}")
    scaling = loss_scale.describe(state.loss_scale, on_card=config.origin("model.dtype").startswith("auto"))
    for line in (*packed.ledger.warnings, *base.warnings, *([scaling] if scaling else [])):
        here.notify(Event("warning", line))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    steps, windows = config.train.steps, packed.windows
    span = f"{steps:,} steps" if not state.step else f"steps {state.step + 1:,} to {steps:,}"
    text = f"training {trainable:,} parameters for {span} on {len(windows):,} windows of {windows.context:,} tokens"
    here.say(text, total_steps=steps, step=state.step, run_dir=str(here.run_dir))


def _settings(config: RunConfig) -> dict[str, object]:
    """Every setting that decides what is computed, by the name that the user knows."""
    return {key: value for key, value in config.flat().items() if key != "model.device"}


def _data(digest: dict[str, dict[str, str]]) -> dict[str, object]:
    return {f"{part} data {name}": value for part, files in digest.items() for name, value in files.items()}


def _same_everywhere(accelerator: Accelerator, text: str) -> str:
    """Return the text of the first process in all processes."""
    texts = [text]
    if accelerator.num_processes > 1:
        broadcast_object_list(texts)
    return texts[0]


def _go_on(
    here: _Here, metrics: MetricsFile, begun: RunState, sound: tuple[Path | None, list[str]], trained: _Trained
) -> RunState:
    """Take up the newest checkpoint that is sound, or the start of a run that was stopped before its first one.

    Args:
        begun: that start.
        sound: from `newest_sound`.
    Returns: where the run stands.
    Raises: RunError: there are checkpoints, and every one is damaged.
    """
    accelerator, run_dir = here.accelerator, here.run_dir
    checkpoint, damaged = sound
    accelerator.wait_for_everyone()  # every process has seen the checkpoints as they were
    if checkpoint is None and damaged:
        raise RunError("\n  ".join([f"cannot resume {run_dir}: no checkpoint is sound", *damaged]))
    if accelerator.is_main_process:
        for folder, problem in zip(reversed(list_checkpoints(run_dir)), damaged, strict=False):
            text = f"{problem}; it is kept as {set_aside(folder).name}, the run goes on from {checkpoint}"
            here.notify(Event("warning", text))
        if not metrics.restore(None if checkpoint is None else checkpoint / "metrics.jsonl"):
            here.notify(Event("warning", f"{metrics.path}: was removed or changed; restored from {checkpoint}"))
        keep_samples_until(run_dir / "samples.jsonl", begun.step if checkpoint is None else read_state(checkpoint).step)
    accelerator.wait_for_everyone()
    if checkpoint is None:
        here.notify(Event("warning", f"{run_dir}: nothing was saved yet; the run starts from the beginning"))
        return begun
    state = load_checkpoint(
        checkpoint,
        model=trained.model,
        optimizer=trained.optimizer,
        device=accelerator.device,
        shards=trained.shards,
    )
    if (told := told_change(state.computed_with, begun.computed_with)) is not None:
        here.notify(Event("warning", told))
    return replace(state, computed_with=begun.computed_with)
