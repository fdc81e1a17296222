"""A fine-tuning run from a config to an adapter: start, then step, measure, evaluate, save.

Three things here are easy to get subtly wrong, and are the point of the file:

- *Accumulation is exact.* The loss of every micro-batch is a sum divided by the trained tokens of the whole optimiser
  step, over all micro-batches and processes. A mean of means weighs a token by the number of its neighbours.
- *A step is a function of its place in the run.* Its windows, learning rate and dropout masks follow from seed and step
  alone, so a resumed run has the losses of an unbroken one, bit for bit on a CPU.
- *State changes in one place*, the optimiser's step. Between two of them a run may be interrupted and saved anywhere.

Not here: what comes before the first step (start.py), what a layer does (engine), what a window holds (data), how a run
directory is kept whole (checkpoint.py).
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longfit.compat.torch import is_out_of_memory
from longfit.compat.torch_distributed import local_part
from longfit.config import RunConfig
from longfit.data.packing import PackedDataset
from longfit.engine.loss.training_loss import TrainingLoss, shifted_labels
from longfit.engine.sweep.evaluation import swept_evaluation
from longfit.errors import DataError, PlanError, RunError, SaveError
from longfit.files.reading import read_text
from longfit.files.writing import why
from longfit.numerics.labels import IGNORED
from longfit.parallel.sequence import SequenceParallelLoss
from longfit.parallel.shard import whole_state, whole_tensor
from longfit.training import loss_scale, memory_check, run_directory
from longfit.training.best import Best, best_of, reason_to_stop, save_best
from longfit.training.checkpoint import RunState, save_checkpoint, save_result, trained_tensors
from longfit.training.interruption import Interruptible
from longfit.training.metrics import Event, OnEvent, ignore, peak_memory_bytes, read_metrics
from longfit.training.model_card import refused_by_servers, write_cards
from longfit.training.optimizer import clip_gradients, discard_file, relieve
from longfit.training.samples import answer, write_samples
from longfit.training.schedule import learning_rate
from longfit.training.start import TrainingRun, start
from longfit.training.trackers import Trackers

PROBE_MARGIN = 1.05  # a window that is longer than those of the first step by more than this is tried before it


@dataclass(frozen=True)
class TrainResult:
    """What came out of a run.

    Attributes:
        run_dir: the run; its ``adapter/`` is the result once ``finished``.
        finished: False if the run was interrupted and can be resumed.
        steps: optimiser steps done, of ``total_steps``.
        first_loss, loss: training loss of the first and of the last step.
        eval_loss: last validation loss, if there is validation text.
        tokens: seen by the run, padding left out.
        seconds: in training steps, of the whole run.
        peak_memory_bytes: allocated on the device, or resident on a CPU.
        checkpoint: the newest one.
    """

    run_dir: Path
    finished: bool
    steps: int
    total_steps: int
    first_loss: float
    loss: float
    eval_loss: float | None
    tokens: int
    seconds: float
    peak_memory_bytes: int
    checkpoint: Path


def train(config: RunConfig, *, on_event: OnEvent | None = None, resume: bool = False) -> TrainResult:
    """Fine-tune as the config says and leave a complete run directory.

    SIGINT, SIGTERM and SIGHUP end the run early with a checkpoint; the result then has ``finished=False``.

    Args:
        config: from `load_config` or `RunConfig.of`.
        on_event: called for everything worth showing, in this process only.
        resume: continue the run in ``output.run_dir`` from its newest sound checkpoint, or from its start if none was
            saved yet.
    Raises:
        PlanError: the run cannot fit this machine, or ran out of memory twice; then its state is saved.
        RunError: the run directory exists (or, resuming, does not), or another process writes there; data, settings or
            the base model changed, or every checkpoint is damaged; the loss is not finite; the disk is full.
        ConfigError, DataError, ModelError: before anything is written.
    """
    notify = on_event or ignore
    config = run_directory.with_absolute_paths(config)
    if resume:
        stored = run_directory.read_config(run_directory.choose_run_dir(config))
        run_directory.require_own_files(run_directory.choose_run_dir(config))
        config, warnings = run_directory.merge_for_resume(stored, config)
        for warning in warnings:
            notify(Event("warning", warning))
    with run_directory.claimed(config, resume=resume, on_event=notify) as run_dir:
        run = start(config, run_dir, notify, resume=resume)
        trackers = Trackers(config.output.track if run.is_main else [], run.run_dir, from_step=run.state.step)
        try:
            return _loop(run)
        finally:
            for problem in trackers.finish():
                notify(Event("warning", problem))
            if run.heartbeat is not None:
                run.heartbeat.stop()


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do.

    Attributes:
        run_dir: where it would write.
        num_windows, total_steps: of its whole length.
        num_parameters: that would be trained.
    """

    run_dir: Path
    num_windows: int
    total_steps: int
    num_parameters: int


def rehearse(config: RunConfig, *, on_event: OnEvent | None = None) -> Rehearsal:
    """Do everything that a run does before its first step, and leave nothing behind.

    Raises: what `train` raises before it writes.
    """
    run_dir = run_directory.choose_run_dir(config)
    run_directory.require_new(run_dir)
    config = run_directory.with_absolute_paths(config)
    with tempfile.TemporaryDirectory(prefix="longfit-dry-run-") as folder:
        if config.optim.file is not None:
            config = config.replace({"optim.file": str(Path(folder) / "optim")}, origin="dry run")
        (Path(folder) / "run").mkdir()
        run = start(config, Path(folder) / "run", on_event or ignore, resume=False)
        if run.heartbeat is not None:
            run.heartbeat.stop()
        num_parameters = sum(parameter.numel() for parameter in run.parameters)
        return Rehearsal(run_dir, len(run.windows), run.total_steps, num_parameters)


# ------------------------------------------------------------------------------------------------ steps
class _NotFiniteError(Exception):
    """The loss or the gradient is NaN or infinite; the parameters are still those of the step before."""


def _loop(run: TrainingRun) -> TrainResult:
    """Train from the run's state to its end, or to an interruption."""
    train, finished = run.config.train, False
    with Interruptible(deferred=run.shards is not None) as interruptible:
        try:
            early = reason_to_stop(read_metrics(run.metrics.path), train.patience)
            if run.state.step < run.total_steps and early is None:
                _probe(run)
            while run.state.step < run.total_steps and early is None:
                _step(run, interruptible)
                done, last = run.state.step, run.state.step == run.total_steps
                if run.validation is not None and (last or done % train.eval_every == 0):
                    early = _evaluate(run, run.validation)
                    last = last or early is not None
                if train.samples and (last or done % train.samples_every == 0):
                    _sample(run)
                if last or done % train.save_every == 0:
                    with interruptible.held():
                        _save(run)
                if run.shards is not None and _over_processes(run, interruptible.requested):
                    raise KeyboardInterrupt  # in all processes, as each has a part of what is saved
            with interruptible.held():
                _save_result(run)
            run.accelerator.wait_for_everyone()
            discard_file(run.optimizer)
            finished = True
            if early is not None:
                run.tell(Event("phase", f"stopped after step {run.state.step} of {run.total_steps}: {early}"))
        except KeyboardInterrupt:
            with interruptible.held():
                _save(run)
        except PlanError as error:
            if run.layout.devices > 1:  # it is this process's trouble alone: the others are in the middle of the step
                raise
            with interruptible.held():
                _save(run)
            checkpoint = run_directory.last_checkpoint(run.run_dir)
            raise PlanError(f"step {run.state.step + 1}: {error}. The state before it is in {checkpoint}") from None
        except _NotFiniteError as error:
            with interruptible.held():
                _save(run)
            checkpoint = run_directory.last_checkpoint(run.run_dir)
            raise RunError(f"{error}. Nothing of it was learned; the state before it is in {checkpoint}") from None
        except SaveError:
            raise
        except (RunError, OSError) as error:  # of the disk: metrics, offloaded inputs, streamed weights
            what = why(error) if isinstance(error, OSError) else str(error)
            raise RunError(f"step {run.state.step + 1}: {what}. {_keep(run, interruptible)}") from error
    return _result(run, finished=finished)


def _probe(run: TrainingRun) -> None:
    """Run the longest window once, if the first step has none as long: what does not fit shows now, not in an hour.

    All processes decide alike, from the windows of all of them: if one tried a window alone, its exchanges would meet
    others.
    """
    size, lengths = run.config.train.batch_size, run.window_lengths
    everyone = [_window_indices(run, share) for share in range(run.layout.data)]
    first = max(int(lengths[index]) for shares in everyone for indices in shares for index in indices)
    longest = [int(index) for index in np.argsort(-lengths, kind="stable")[:size]]
    if int(lengths[longest[0]]) <= PROBE_MARGIN * first:
        return
    run.tell(Event("phase", f"trying the longest window, {int(lengths[longest[0]]):,} tokens"))
    batch = _batch(run, longest)
    num_trained = _over_windows(run, _num_trained(batch))
    _within_memory(run, partial(_differentiate, run, [batch], max(num_trained, 1), run.state.loss_scale))
    run.optimizer.zero_grad(set_to_none=True)
    if run.shards is not None:
        run.shards.drop_gradients()


def _step(run: TrainingRun, interruptible: Interruptible) -> None:
    """Take one optimiser step and write its line into ``metrics.jsonl``."""
    began = time.perf_counter()
    train, step = run.config.train, run.state.step
    batches = [_batch(run, indices) for indices in _window_indices(run, run.layout.window_of(run.rank))]
    num_trained = _over_windows(run, sum(_num_trained(batch) for batch in batches))
    num_tokens = int(_over_windows(run, sum(int(run.window_lengths[batch.indices].sum()) for batch in batches)))

    loss, grad_norm, scale = _scaled_gradients(run, batches, num_trained)
    _require_finite(run, "gradient norm", grad_norm, batches[-1])

    rate = learning_rate(
        step,
        train.learning_rate,
        total_steps=run.total_steps,
        warmup_steps=train.warmup_steps or 0,
        schedule=train.schedule,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    of_each = _of_each_process(run) if run.layout.devices > 1 else {}
    with interruptible.held():  # the parameters, the state and the line about them change together
        run.optimizer.step()
        run.state = RunState(
            step=step + 1,
            windows_seen=run.state.windows_seen + sum(len(batch.indices) for batch in batches) * run.layout.data,
            tokens_seen=run.state.tokens_seen + num_tokens,
            num_processes=run.layout.data,
            gradient_accumulation=train.gradient_accumulation,
            run_id=run.state.run_id,
            loss_scale=loss_scale.after_step(scale, step + 1),
        )
        seconds = time.perf_counter() - began
        run.seconds += seconds
        record = {
            "step": step + 1,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": rate,
            "tokens": num_tokens,
            "trained_tokens": int(num_trained),
            "tokens_per_s": num_tokens / seconds,
            "step_s": seconds,
            "peak_memory_bytes": peak_memory_bytes(run.accelerator.device),
            **of_each,
            **({} if run.plan is None else {"planned_peak_bytes": run.plan.device_peak}),
            **run.paging.read(),
        }
        run.record(record)
    text = f"step {step + 1}/{run.total_steps}  loss {loss:.4f}  grad {grad_norm:.3f}  lr {rate:.2e}"
    run.tell(Event("step", f"{text}  {num_tokens / seconds:,.0f} tokens/s", record))


def _scaled_gradients(run: TrainingRun, batches: list["_Batch"], num_trained: float) -> tuple[float, float, float]:
    """Make and clip the gradients of a step, again with half the loss scale as long as they overflow float16.

    Returns: the loss and the gradient norm over all processes, and the scale that they were made with.
    """
    scale = run.state.loss_scale
    while True:
        differentiate = partial(_differentiate, run, batches, num_trained, scale)
        loss = _over_processes(run, _within_memory(run, differentiate))
        _require_finite(run, "loss", loss, batches[-1])
        grad_norm = clip_gradients(run.parameters, run.config.train.max_grad_norm, scale=scale, shards=run.shards)
        smaller = None if math.isfinite(grad_norm) else loss_scale.after_overflow(scale)
        if smaller is None:
            return loss, grad_norm, scale
        run.tell(Event("phase", f"gradients overflow float16 at loss scale {scale:,.0f}: again at {smaller:,.0f}"))
        scale = smaller


def _within_memory(run: TrainingRun, differentiate: Callable[[], float]) -> float:
    """Call what makes gradients; where memory runs out, make room and call it again.

    Of several processes none may try again alone: the others wait for its gradients where they are.

    Raises: PlanError: memory ran out for good.
    """
    if run.layout.devices == 1:
        return run.step_down.run(partial(relieve, run.optimizer, differentiate))
    try:
        return differentiate()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise PlanError(f"out of memory ({error}); choose a smaller engine.tile or engine.offload=file") from error


def _differentiate(run: TrainingRun, batches: list["_Batch"], num_trained: float, scale: float) -> float:
    """Put the gradients of a step's micro-batches in their place; return this process's part of the loss."""
    accelerator, loss = run.accelerator, 0.0
    loss_scale.begin(run.parameters, num_processes=accelerator.num_processes)
    if run.shards is not None:
        run.shards.drop_gradients()
    for number, batch in enumerate(batches):
        torch.manual_seed(_seed(run.config.train.seed, run.state.step, number, run.rank))
        last = number == len(batches) - 1  # shards are reduced in each pass: whole gradients would take their place
        with nullcontext() if last or run.shards is not None else accelerator.no_sync(run.loss_module):
            part = run.loss_module(**batch.tensors, num_items=num_trained / scale)
            # Data-parallel wrappers average gradients over processes, but these parts must add up.
            accelerator.backward(part * accelerator.num_processes)
        loss += part.item() / scale
        if run.layout.devices == 1:  # else all processes must hear of it before one of them leaves
            _require_finite(run, "loss", loss, batch)
    if run.shards is not None:
        run.shards.collect_gradients()
    return loss


@dataclass(frozen=True)
class _Batch:
    """Some windows, stacked, on the device: ``input_ids``, ``position_ids`` and ``labels``, each ``[B, T]``."""

    indices: list[int]
    tensors: dict[str, Tensor]


def _window_indices(run: TrainingRun, window: int) -> Iterator[list[int]]:
    """Yield the windows of each micro-batch of this step, of the ``window``-th of those that are trained at once.

    The whole run walks `PackedDataset.order`.
    """
    train = run.config.train
    first = run.state.windows_seen
    for number in range(train.gradient_accumulation):
        share = number * run.layout.data + window
        positions = range(first + share * train.batch_size, first + (share + 1) * train.batch_size)
        yield [int(run.windows.order(p // len(run.windows))[p % len(run.windows)]) for p in positions]


def _batch(run: TrainingRun, indices: list[int], *, windows: PackedDataset | None = None) -> _Batch:
    rows = [(windows or run.windows)[index] for index in indices]
    device = run.accelerator.device
    return _Batch(indices, {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]})


def _num_trained(batch: _Batch) -> int:
    """Count the tokens a batch is trained on: the labels that count once they are shifted."""
    tensors = batch.tensors
    targets = shifted_labels(tensors["input_ids"], tensors["labels"], tensors["position_ids"], None)
    return int((targets != IGNORED).sum())


def _seed(seed: int, *place: int) -> int:
    """Mix the run's seed with a place in the run: neighbouring places get unrelated random numbers."""
    return int.from_bytes(blake2b(repr((seed, *place)).encode(), digest_size=7).digest(), "little")


def _over_processes(run: TrainingRun, value: float) -> float:
    """Add up a number over all processes."""
    if run.accelerator.num_processes == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=run.accelerator.device)
    return float(run.accelerator.reduce(total, reduction="sum").item())


def _over_windows(run: TrainingRun, value: float) -> float:
    """Add up a number over all windows trained at once; those who share a window all know it, the first tells it."""
    return _over_processes(run, value if run.layout.stretch_of(run.rank) == 0 else 0)


def _of_each_process(run: TrainingRun) -> dict[str, list[int]]:
    """The most memory that each process has held so far, its weights, and the bytes of keys that it has sent."""
    own = {
        "peak_memory_bytes_by_process": peak_memory_bytes(run.accelerator.device),
        "weight_bytes_by_process": sum(local_part(parameter).nbytes for parameter in run.model.parameters()),
    }
    if isinstance(run.loss_of, SequenceParallelLoss):
        own["halo_bytes_by_process"] = run.loss_of.traffic.taken()
    gathered = run.accelerator.gather(torch.tensor([list(own.values())], device=run.accelerator.device))
    return {name: gathered[:, number].tolist() for number, name in enumerate(own)}


def _require_finite(run: TrainingRun, what: str, value: float, batch: _Batch) -> None:
    if math.isfinite(value):
        return
    windows = run.windows
    pieces = [range(windows.windows[index], windows.windows[index + 1]) for index in batch.indices]
    names = [windows.documents[windows.pieces.document[piece]].name for span in pieces for piece in span]
    raise _NotFiniteError(
        f"step {run.state.step + 1}: the {what} is {value} on window {', '.join(map(str, batch.indices))} "
        f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); lower train.learning_rate, or look at that text"
    )


# ------------------------------------------------------------------------------------------------ between steps
@torch.no_grad()
def _evaluate(run: TrainingRun, validation: PackedDataset) -> str | None:
    """Measure the validation loss; shifted attention acts only in train mode, so this one is exact.

    Processes may have different numbers of windows, one even none. So nothing is exchanged before all are done: the
    model is called without the wrapper that would. Only shards must be gathered by all: who has no window left takes
    part with one that does not count.

    Returns: why the run ends here, or None.
    """
    num_windows = min(len(validation), run.config.data.validation_windows)
    total, count = 0.0, 0
    loss_of = run.loss_module
    if run.shards is None:
        loss_of = TrainingLoss(run.model, engine=run.config.engine.engine, loss=run.loss_of)
    own = range(run.layout.window_of(run.rank), num_windows, run.layout.data)
    rounds = len(own) if run.shards is None else -(-num_windows // run.layout.data)
    with swept_evaluation(run.model):
        for number in range(rounds):
            counts = number < len(own)
            batch = _batch(run, [own[number] if counts else 0], windows=validation)
            part = loss_of(**batch.tensors, num_items=1).item()  # a sum
            if counts:
                total += part
                count += _num_trained(batch)
    if run.shards is not None:
        run.loss_module.reshard()  # without a backward the outermost module stays gathered
    loss = _over_processes(run, total) / _over_windows(run, count)
    record: dict[str, object] = {"step": run.state.step, "eval_loss": loss, "eval_windows": num_windows}
    now = Best(run.state.step, loss)
    # Another process may have written this very line by now, but all must decide alike.
    before = [line for line in read_metrics(run.metrics.path) if int(str(line["step"])) < now.step]
    best = best_of([*before, record]) == now
    run.record({**record, "best": best})
    run.tell(Event("eval", f"step {now.step}: validation loss {loss:.4f}{', the best so far' * best}", record))
    if best and run.config.train.keep_best:
        trained = None if run.shards is None else _whole_trained(run)
        if run.is_main:
            save_best(run.run_dir, now, model=run.model, tokenizer=run.tokenizer, trained=trained)
    reason = reason_to_stop([*before, record], run.config.train.patience)
    return reason


def _sample(run: TrainingRun) -> None:
    """Ask the model what ``train.samples`` says; all processes do, as a sharded model needs them all."""
    train = run.config.train
    document = None
    if train.samples_document:
        document = read_text(
            Path(train.samples_document), DataError, what="train.samples_document", do="give a text file"
        )
    with swept_evaluation(run.model):
        answers = {
            prompt: answer(run.model, run.tokenizer, prompt, document=document, max_new_tokens=train.samples_tokens)
            for prompt in train.samples
        }
    if run.is_main:
        write_samples(run.run_dir / "samples.jsonl", run.state.step, answers)


def _save(run: TrainingRun) -> None:
    with nullcontext() if run.heartbeat is None else run.heartbeat.patient():
        _save_checkpoint(run)


def _save_checkpoint(run: TrainingRun) -> None:
    whole = None
    if run.shards is not None:
        whole = _whole_trained(run), whole_state(run.optimizer.state_dict(), run.shards.parameters)
    if run.is_main:
        path = save_checkpoint(
            run.run_dir,
            run.state,
            model=run.model,
            tokenizer=run.tokenizer,
            optimizer=run.optimizer,
            keep=run.config.train.keep_checkpoints,
            whole=whole,
        )
        run.tell(Event("checkpoint", f"saved {path}", {"step": run.state.step, "path": str(path)}))


def _keep(run: TrainingRun, interruptible: Interruptible) -> str:
    """Save the state if that can be done; say what is kept and how to go on."""
    try:
        with interruptible.held():
            _save(run)
        checkpoint = run_directory.last_checkpoint(run.run_dir)
    except RunError as error:
        return str(error)
    return f"The state is saved in {checkpoint}: resume the run with --resume"


def _whole_trained(run: TrainingRun) -> dict[str, Tensor]:
    """The trained tensors, whole, in host memory; every process must call it."""
    return {name: whole_tensor(tensor.detach()).cpu() for name, tensor in trained_tensors(run.model).items()}


def _save_result(run: TrainingRun) -> None:
    trained = None if run.shards is None else _whole_trained(run)
    if run.is_main:
        save_result(run.run_dir, model=run.model, tokenizer=run.tokenizer, trained=trained)
        write_cards(run.run_dir, run.config)
        refused = refused_by_servers(run.config, run.run_dir)
        if refused is not None:
            run.tell(Event("warning", refused))


def _result(run: TrainingRun, *, finished: bool) -> TrainResult:
    peak = peak_memory_bytes(run.accelerator.device)
    if run.plan is not None and run.is_main:
        run_directory.write_plan(run.run_dir, memory_check.plan_json(run.plan, measured_bytes=peak))
        run.tell(Event("phase", memory_check.compare(run.plan, peak)))
    records = read_metrics(run.metrics.path)
    losses = [float(str(record["loss"])) for record in records if "loss" in record]
    eval_losses = [float(str(record["eval_loss"])) for record in records if "eval_loss" in record]
    return TrainResult(
        run_dir=run.run_dir,
        finished=finished,
        steps=run.state.step,
        total_steps=run.total_steps,
        first_loss=losses[0] if losses else math.nan,
        loss=losses[-1] if losses else math.nan,
        eval_loss=eval_losses[-1] if eval_losses else None,
        tokens=run.state.tokens_seen,
        seconds=run.seconds,
        peak_memory_bytes=peak,
        checkpoint=run_directory.last_checkpoint(run.run_dir),
    )
