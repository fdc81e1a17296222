"""The validation loss of a run between two steps, and the adapter of its best evaluation."""

import torch

from longfit.data.packing import PackedDataset
from longfit.engine.loss.training_loss import TrainingLoss
from longfit.engine.sweep.evaluation import swept_evaluation
from longfit.training.best import Best, best_of, reason_to_stop, save_best
from longfit.training.metrics import Event, read_metrics
from longfit.training.micro_batches import count_trained, make_batch
from longfit.training.training_run import TrainingRun


@torch.no_grad()
def evaluate(run: TrainingRun, validation: PackedDataset) -> str | None:
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
            batch = make_batch(run, [own[number] if counts else 0], windows=validation)
            part = loss_of(**batch.tensors, num_items=1).item()  # a sum
            if counts:
                total += part
                count += count_trained(batch)
    if run.shards is not None:
        run.loss_module.reshard()  # without a backward the outermost module stays gathered
    loss = run.over_processes(total) / run.over_windows(count)
    record: dict[str, object] = {"step": run.state.step, "eval_loss": loss, "eval_windows": num_windows}
    now = Best(run.state.step, loss)
    # Another process may have written this very line by now, but all must decide alike.
    before = [line for line in read_metrics(run.metrics.path) if int(str(line["step"])) < now.step]
    best = best_of([*before, record]) == now
    run.record({**record, "best": best})
    run.tell(Event("eval", f"step {now.step}: validation loss {loss:.4f}{', the best so far' * best}", record))
    if best and run.config.train.keep_best:
        trained = run.whole_trained()
        if run.is_main:
            save_best(run.run_dir, now, model=run.model, tokenizer=run.tokenizer, trained=trained)
    return reason_to_stop([*before, record], run.config.train.patience)
