"""Checkpoints that a kill, a full disk, a flipped bit or a second run cannot break.

    checkpoints/step-000123/
        adapter/                PEFT's files, tokenizer and config: usable by itself
        trainable.safetensors   the trained tensors exactly as they are in memory, by parameter name
        optimizer.pt            the optimiser's state
        metrics.jsonl           the run's metrics up to this step
        state.json              step, windows seen, number of processes, versions and kernels
        checksums.json          of all of these

A checkpoint is written under a hidden name and renamed when every byte is on the disk, so whatever has the name of a
checkpoint is complete; what happened to it since then, its checksums tell. There is no schedule to save (`schedule.py`
is a function of the step), no data position beyond the number of windows seen (their order is a function of seed and
epoch) and no random state: every micro-batch seeds the generators from (seed, step, number, process), so a dropout mask
depends on its place, not on what ran before.
"""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longfit.errors import LongfitError, RunError, SaveError
from longfit.files import checksums
from longfit.files.reading import read_object, reading
from longfit.files.writing import FULL, UNFINISHED, flush_folder, remove_folder, replace_folder, why
from longfit.optim.adamw import PagedAdamW
from longfit.parallel.shard import Shards, local_rows, own_rows, own_state
from longfit.planning.disk_bytes import adapter_bytes, checkpoint_bytes, run_bytes
from longfit.words import format_bytes

FORMAT = 2


@dataclass(frozen=True)
class RunState:
    """Where in a run a checkpoint stands."""

    step: int
    windows_seen: int
    tokens_seen: int
    num_processes: int = 1  # windows trained at once
    gradient_accumulation: int | None = None  # of these; None is what the config says
    run_id: str = ""  # the same in all checkpoints of a run, and in its file of paged optimiser state
    loss_scale: float = 1.0  # of the next step
    computed_with: dict[str, str] = field(default_factory=dict)  # `computed_with.py`
    format: int = FORMAT


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` optimiser steps."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def save_checkpoint(
    run_dir: Path,
    state: RunState,
    *,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    keep: int,
    whole: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> Path:
    """Write the checkpoint of ``state.step``, then drop all but the newest ``keep``.

    Args:
        run_dir: directory of the run, which must exist.
        model: a PeftModel; its parameters that require gradients are saved.
        keep: checkpoints that stay, this one included.
        whole: trained tensors and optimiser state, where the model and the optimiser have only rows of them.
    Returns: the checkpoint's folder.
    Raises: SaveError: the disk is full or cannot be written; earlier checkpoints stay untouched.
    """
    from safetensors.torch import save_file

    from longfit.model.save import save_adapter

    final = checkpoint_dir(run_dir, state.step)
    if final.exists():
        return final  # the state after a step is a function of the run: it is this one
    trained, optimizer_state = whole or (trained_tensors(model), optimizer.state_dict())
    needed = checkpoint_bytes(trained=num_bytes(trained), state=num_bytes(optimizer_state))

    def write(folder: Path) -> None:
        save_adapter(model, tokenizer, folder / "adapter", trained=whole[0] if whole else None)
        save_file({name: tensor.contiguous() for name, tensor in trained.items()}, folder / "trainable.safetensors")
        torch.save(optimizer_state, folder / "optimizer.pt")
        commit_optimizer(optimizer, state)
        metrics = run_dir / "metrics.jsonl"
        (folder / "metrics.jsonl").write_bytes(metrics.read_bytes() if metrics.exists() else b"")
        (folder / "state.json").write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        checksums.seal_folder(folder)

    with saving(run_dir, final, needed):
        final.parent.mkdir(exist_ok=True)  # not its parents: a run that somebody removed is not begun again
        require_free(final.parent, needed)
        replace_folder(final, write)
    for old in list_checkpoints(run_dir)[:-keep]:
        remove_folder(old)
    flush_folder(final.parent)
    return final


def save_result(run_dir: Path, *, model: Any, tokenizer: Any, trained: dict[str, Tensor] | None = None) -> Path:
    """Write the adapter that a run is for, in the place of an older one.

    Args:
        trained: its tensors, where the model has only rows of them.
    Returns: its folder.
    Raises: SaveError: the disk is full or cannot be written; checkpoints stay untouched.
    """
    from longfit.model.save import save_adapter

    final = run_dir / "adapter"
    needed = adapter_bytes(num_bytes(trained or trained_tensors(model)))

    def write(folder: Path) -> None:
        save_adapter(model, tokenizer, folder, trained=trained)
        checksums.seal_folder(folder)

    with saving(run_dir, final, needed):
        require_free(run_dir, needed)
        replace_folder(final, write)
    return final


@contextmanager
def saving(run_dir: Path, final: Path, needed: int) -> Iterator[None]:
    """Turn what goes wrong with the disk while ``final`` is written into a SaveError; ``needed`` are its bytes."""
    try:
        yield
    except LongfitError:
        raise
    except OSError as error:
        raise SaveError(_cannot_save(run_dir, final, error, needed)) from error
    except RuntimeError as error:  # torch.save hides a disk behind an error of its own
        refused = _refusal(run_dir, needed)
        if refused is None:
            raise
        raise SaveError(_cannot_save(run_dir, final, refused, needed)) from error


def require_disk_room(run_dir: Path, *, trained: int, state: int, keep: int, best: bool = False) -> None:
    """Raise SaveError before the first step if the run's checkpoints and result cannot be written where it is.

    Args:
        trained, state: bytes of what is trained and of its optimiser state.
        keep: checkpoints kept.
        best: whether the adapter of the best evaluation is kept.
    """
    needed = run_bytes(trained=trained, state=state, keep=keep, best=best) - folder_bytes(run_dir)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        each = format_bytes(checkpoint_bytes(trained=trained, state=state))
        raise SaveError(
            f"{run_dir}: the run will write {format_bytes(needed)} ({keep} checkpoints of {each}, one more while it is "
            f"written, the result{', the best' * best}), the disk has {format_bytes(free)} free; free some space, "
            "lower train.keep_checkpoints, or choose a --run-dir on another disk"
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder; 0 if it is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_free(folder: Path, needed: int) -> None:
    """Raise the OSError of a full disk before anything is written to it."""
    if not has_free(folder, needed):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def has_free(folder: Path, needed: int) -> bool:
    """Whether the disk that a folder is on has room; a folder that is gone has none."""
    try:
        return shutil.disk_usage(folder).free >= needed
    except OSError:
        return False


def _refusal(folder: Path, needed: int) -> OSError | None:
    """What the disk of a folder says to a new file; None if it takes one of ``needed`` bytes."""
    probe = folder / f".probe{UNFINISHED}"  # of a name that is swept
    try:
        probe.touch()
        probe.unlink()
        require_free(folder, needed)
    except OSError as error:
        return error
    return None


def newest_sound(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that is as it was written.

    Returns: its folder, None if there is none; for each damaged one after it what is wrong.
    """
    problems: list[str] = []
    for folder in reversed(list_checkpoints(run_dir)):
        found = damage(folder)
        if not found:
            return folder, problems
        problems.append(f"{folder} is damaged: {'; '.join(found[:3])}")
    return None, problems


def damage(folder: Path) -> list[str]:
    """Say what is wrong with a checkpoint's files; nothing if every byte is as it was written."""
    try:
        read_state(folder)
    except RunError as error:
        return [str(error)]
    return checksums.folder_damage(folder)


def set_aside(folder: Path) -> Path:
    """Give a damaged checkpoint another name, so that the run may write that step again; returns the new place."""
    aside = folder.with_name(f"{folder.name}.damaged")
    if aside.exists():
        shutil.rmtree(aside)
    return folder.rename(aside)


def load_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    shards: Shards | None = None,
) -> RunState:
    """Put a checkpoint's tensors into the model and the optimiser.

    Args:
        shards: what this process has of the model, where it has rows of it only.
    Returns: where the run stands.
    Raises: RunError: the checkpoint does not belong to this model or to this version of longfit.
    """
    with reading(folder, "the checkpoint", RunError, do="delete it to resume from an earlier one"):
        return _load(folder, model=model, optimizer=optimizer, device=device, shards=shards)


def _load(
    folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, shards: Shards | None
) -> RunState:
    from safetensors.torch import load_file

    state = read_state(folder)
    if device.type == "cpu":
        device = torch.device("cpu")  # Accelerate's "cpu:0" is no place to safetensors and torch.load
    saved = load_file(folder / "trainable.safetensors", device=str(device))
    parameters = trained_tensors(model)
    wrong = sorted(saved.keys() ^ parameters.keys())
    wrong += sorted(name for name in saved.keys() & parameters.keys() if saved[name].shape != parameters[name].shape)
    if wrong:
        raise RunError(f"{folder}: does not belong to this model: {len(wrong)} tensors differ, first {wrong[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            local_rows(parameter).copy_(own_rows(saved[name], parameter))
    if isinstance(optimizer, PagedAdamW):
        if optimizer.committed_mark != _mark(state):  # else its file holds this very state
            saved = _load_state(folder / "optimizer.pt", map_location="cpu", mmap=True)
            optimizer.load_state_dict(saved if shards is None else own_state(saved, shards.parameters))
    else:
        saved = _load_state(folder / "optimizer.pt", map_location=device)
        optimizer.load_state_dict(saved if shards is None else own_state(saved, shards.parameters))
    return state


def _load_state(path: Path, **how: Any) -> dict[str, Any]:
    """Read tensors and numbers; nothing else that a pickle may hold is made, let alone called."""
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True, **how)
    except pickle.UnpicklingError as error:  # torch advises to read it with its code
        raise RunError(
            f"{path}: holds something else than tensors; delete the checkpoint, it is not longfit's"
        ) from error
    return saved


def commit_optimizer(optimizer: torch.optim.Optimizer, state: RunState) -> None:
    """Let a file of paged state hold the state of this moment, so that a resumed run finds it in its place.

    A kill between this and the checkpoint's renaming leaves a file that is ahead of the newest checkpoint. The marks
    then differ, and the checkpoint's own copy is loaded.
    """
    if isinstance(optimizer, PagedAdamW) and optimizer.has_file:
        optimizer.commit(_mark(state))


def _mark(state: RunState) -> str:
    return f"step {state.step}"


def read_state(folder: Path) -> RunState:
    """Read where in its run a checkpoint stands.

    Raises: RunError: it is missing, damaged, or of another format.
    """
    path = folder / "state.json"
    do = f"delete {folder} to resume from an earlier one"
    values = read_object(path, RunError, what="the state of the run", do=do)
    if values.get("format") != FORMAT:
        raise RunError(f"{path}: format {values.get('format')}, this version of longfit reads {FORMAT}; {do}")
    with reading(path, "the state of the run", RunError, do=do):
        return RunState(**values)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained, by name; a tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def num_bytes(tree: Any) -> int:
    """Add up the bytes of the tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(num_bytes(value) for value in values)


def _cannot_save(run_dir: Path, final: Path, error: OSError, needed: int) -> str:
    what = why(error)
    if error.errno in FULL:
        what = f"the disk is full, it needs {format_bytes(needed)}: free some space"
    return f"{final}: cannot save: {what}; {what_stays(run_dir)}"


def what_stays(run_dir: Path) -> str:
    """Say what of a run is kept when it has to end, and how to go on."""
    if not run_dir.exists():
        return f"{run_dir} has gone with all that was in it: start the run again"
    earlier = list_checkpoints(run_dir)
    stays = f"{earlier[-1]} stays valid" if earlier else "no checkpoint was saved yet, the run will begin anew"
    return f"{stays}. Then go on with longfit train --run-dir {run_dir} --resume"
