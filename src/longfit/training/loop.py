"""A fine-tuning run from a config to an adapter: start, then step, evaluate, sample, save.

Not here: what comes before the first step (start.py), a step (step.py), the validation loss (validation.py), what a
layer does (engine), what a window holds (data), how a run directory is kept whole (checkpoint.py).
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from longfit.config import RunConfig
from longfit.engine.sweep.evaluation import swept_evaluation
from longfit.errors import DataError, PagingError, PlanError, RunError, SaveError
from longfit.files.reading import read_text
from longfit.files.writing import why
from longfit.parallel.shard import whole_state
from longfit.training import memory_check, run_directory
from longfit.training.best import reason_to_stop
from longfit.training.checkpoint import save_checkpoint, save_result, what_stays
from longfit.training.interruption import Interruptible
from longfit.training.metrics import Event, OnEvent, ignore, peak_memory_bytes, read_metrics
from longfit.training.model_card import refused_by_servers, write_cards
from longfit.training.optimizer import discard_file
from longfit.training.same_run import merge_for_resume
from longfit.training.samples import answer, write_samples
from longfit.training.start import start
from longfit.training.step import NotFiniteError, take_step, try_longest_window
from longfit.training.trackers import Trackers
from longfit.training.training_run import TrainingRun
from longfit.training.validation import evaluate


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
        config, warnings = merge_for_resume(stored, config)
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


def _loop(run: TrainingRun) -> TrainResult:
    """Train from the run's state to its end, or to an interruption."""
    train, finished = run.config.train, False
    with Interruptible(deferred=run.shards is not None) as interruptible:
        try:
            early = reason_to_stop(read_metrics(run.metrics.path), train.patience)
            if run.state.step < run.total_steps and early is None:
                try_longest_window(run)
            while run.state.step < run.total_steps and early is None:
                take_step(run, interruptible)
                done, last = run.state.step, run.state.step == run.total_steps
                if run.validation is not None and (last or done % train.eval_every == 0):
                    early = evaluate(run, run.validation)
                    last = last or early is not None
                if train.samples and (last or done % train.samples_every == 0):
                    _sample(run)
                if last or done % train.save_every == 0:
                    with interruptible.held():
                        _save(run)
                if run.shards is not None and run.over_processes(interruptible.requested):
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
        except NotFiniteError as error:
            with interruptible.held():
                _save(run)
            checkpoint = run_directory.last_checkpoint(run.run_dir)
            raise RunError(f"{error}. Nothing of it was learned; the state before it is in {checkpoint}") from None
        except SaveError:
            raise
        except PagingError as error:  # in the middle of a step: the parameters are of no moment that could be saved
            raise PagingError(f"step {run.state.step + 1}: {error}. {what_stays(run.run_dir)}") from error
        except (RunError, OSError) as error:  # of the disk: metrics, offloaded inputs, streamed weights
            what = why(error) if isinstance(error, OSError) else str(error)
            raise RunError(f"step {run.state.step + 1}: {what}. {_keep(run, interruptible)}") from error
    return _result(run, finished=finished)


# ------------------------------------------------------------------------------------------------ between steps


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
    whole, trained = None, run.whole_trained()
    if run.shards is not None and trained is not None:
        whole = trained, whole_state(run.optimizer.state_dict(), run.shards.parameters)
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
        told = max((int(str(record["step"])) for record in read_metrics(run.metrics.path)), default=0)
        if told < run.state.step:  # the line about the last step could not be written: it is taken again
            return what_stays(run.run_dir)
        with interruptible.held():
            _save(run)
        checkpoint = run_directory.last_checkpoint(run.run_dir)
    except RunError as error:
        return str(error)
    return f"The state is saved in {checkpoint}: resume the run (longfit train --run-dir RUN --resume)"


def _save_result(run: TrainingRun) -> None:
    trained = run.whole_trained()
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
