"""One optimiser step: the gradients of its micro-batches, clipped, then the parameters and the state at once.

- *Accumulation is exact.* The loss of every micro-batch is a sum divided by the trained tokens of the whole optimiser
  step, over all micro-batches and processes. A mean of means weighs a token by the number of its neighbours.
- *A step is a function of its place in the run.* Its windows, learning rate and dropout masks follow from seed and step
  alone, so a resumed run has the losses of an unbroken one, bit for bit on a CPU.
- *State changes in one place*, the optimiser's step. Between two of them a run may be interrupted and saved anywhere.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from hashlib import blake2b

import numpy as np
import torch

from longfit.compat.torch import is_out_of_memory
from longfit.compat.torch_distributed import local_part
from longfit.errors import PlanError
from longfit.parallel.sequence import SequenceParallelLoss
from longfit.training import loss_scale
from longfit.training.interruption import Interruptible
from longfit.training.metrics import Event, peak_memory_bytes
from longfit.training.micro_batches import Batch, count_trained, make_batch, window_indices
from longfit.training.optimizer import clip_gradients, relieve
from longfit.training.schedule import learning_rate
from longfit.training.training_run import TrainingRun

PROBE_MARGIN = 1.05  # a window that is longer than those of the first step by more than this is tried before it


class NotFiniteError(Exception):
    """The loss or the gradient is NaN or infinite; the parameters are still those of the step before."""


def try_longest_window(run: TrainingRun) -> None:
    """Run the longest window once, if the first step has none as long: what does not fit shows now, not in an hour.

    All processes decide alike, from the windows of all of them: if one tried a window alone, its exchanges would meet
    others.
    """
    size, lengths = run.config.train.batch_size, run.window_lengths
    everyone = [window_indices(run, share) for share in range(run.layout.data)]
    first = max(int(lengths[index]) for shares in everyone for indices in shares for index in indices)
    longest = [int(index) for index in np.argsort(-lengths, kind="stable")[:size]]
    if int(lengths[longest[0]]) <= PROBE_MARGIN * first:
        return
    run.tell(Event("phase", f"trying the longest window, {int(lengths[longest[0]]):,} tokens"))
    batch = make_batch(run, longest)
    num_trained = run.over_windows(count_trained(batch))
    _within_memory(run, partial(_differentiate, run, [batch], max(num_trained, 1), run.state.loss_scale))
    run.optimizer.zero_grad(set_to_none=True)
    if run.shards is not None:
        run.shards.drop_gradients()


def take_step(run: TrainingRun, interruptible: Interruptible) -> None:
    """Take one optimiser step and write its line into ``metrics.jsonl``."""
    began = time.perf_counter()
    train, step = run.config.train, run.state.step
    batches = [make_batch(run, indices) for indices in window_indices(run, run.layout.window_of(run.rank))]
    num_trained = run.over_windows(sum(count_trained(batch) for batch in batches))
    num_tokens = int(run.over_windows(sum(int(run.window_lengths[batch.indices].sum()) for batch in batches)))

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
        run.state = replace(
            run.state,
            step=step + 1,
            windows_seen=run.state.windows_seen + sum(len(batch.indices) for batch in batches) * run.layout.data,
            tokens_seen=run.state.tokens_seen + num_tokens,
            num_processes=run.layout.data,
            gradient_accumulation=train.gradient_accumulation,
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


def _scaled_gradients(run: TrainingRun, batches: list[Batch], num_trained: float) -> tuple[float, float, float]:
    """Make and clip the gradients of a step, again with half the loss scale as long as they overflow float16.

    Returns: the loss and the gradient norm over all processes, and the scale that they were made with.
    """
    scale = run.state.loss_scale
    while True:
        differentiate = partial(_differentiate, run, batches, num_trained, scale)
        loss = run.over_processes(_within_memory(run, differentiate))
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


def _differentiate(run: TrainingRun, batches: list[Batch], num_trained: float, scale: float) -> float:
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


def _seed(seed: int, *place: int) -> int:
    """Mix the run's seed with a place in the run: neighbouring places get unrelated random numbers."""
    return int.from_bytes(blake2b(repr((seed, *place)).encode(), digest_size=7).digest(), "little")


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


def _require_finite(run: TrainingRun, what: str, value: float, batch: Batch) -> None:
    if math.isfinite(value):
        return
    windows = run.windows
    pieces = [range(windows.windows[index], windows.windows[index + 1]) for index in batch.indices]
    names = [windows.documents[windows.pieces.document[piece]].name for span in pieces for piece in span]
    raise NotFiniteError(
        f"step {run.state.step + 1}: the {what} is {value} on window {', '.join(map(str, batch.indices))} "
        f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); lower train.learning_rate, or look at that text"
    )
