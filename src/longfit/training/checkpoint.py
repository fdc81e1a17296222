"""Checkpoints that a kill, a full disk or a second run cannot break.

    checkpoints/step-000123/
        adapter/                PEFT's files, tokenizer and config: usable by itself
        trainable.safetensors   the trained tensors exactly as they are in memory, by parameter name
        optimizer.pt            the optimiser's state
        state.json              step, windows seen, versions, number of processes

A checkpoint is written under a hidden name and renamed when every byte is on the disk, so whatever has the name of a
checkpoint is complete. There is no schedule to save (`schedule.py` is a function of the step), no data position beyond
the number of windows seen (their order is a function of seed and epoch) and no random state: every micro-batch seeds
the generators from (seed, step, number, process), so a dropout mask depends on its place, not on what ran before.
"""

import errno
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longfit.errors import RunError
from longfit.optim.adamw import PagedAdamW
from longfit.parallel.shard import Shards, local_rows, own_rows, own_state
from longfit.words import format_bytes

FORMAT = 1
DISK_RESERVE_BYTES = 16 << 20  # tokenizer, configuration and file-system overhead


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
        run_dir: directory of the run.
        model: a PeftModel; its parameters that require gradients are saved.
        keep: checkpoints that stay, this one included.
        whole: trained tensors and optimiser state, where the model and the optimiser have only rows of them.
    Returns: the checkpoint's folder.
    Raises: RunError: the disk is full or cannot be written; earlier checkpoints stay untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from longfit.model.save import save_adapter

    final = checkpoint_dir(run_dir, state.step)
    if final.exists():
        return final  # the state after a step is a function of the run: it is this one
    unfinished = final.with_name(f".{final.name}.unfinished")
    trained, optimizer_state = whole or (trained_tensors(model), optimizer.state_dict())
    needed = 2 * _num_bytes(trained) + _num_bytes(optimizer_state) + DISK_RESERVE_BYTES
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_folder(unfinished)
        if shutil.disk_usage(final.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        unfinished.mkdir()
        save_adapter(model, tokenizer, unfinished / "adapter", trained=whole[0] if whole else None)
        save_file({name: tensor.contiguous() for name, tensor in trained.items()}, unfinished / "trainable.safetensors")
        torch.save(optimizer_state, unfinished / "optimizer.pt")
        commit_optimizer(optimizer, state)
        (unfinished / "state.json").write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        _flush(unfinished)
        unfinished.rename(final)
        _flush_folder(final.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save and safetensors hide a full disk behind errors of their own.
        remove_folder(unfinished)
        if isinstance(error, OSError) or shutil.disk_usage(run_dir).free < needed:
            raise RunError(_cannot_save(final, error, needed)) from error
        raise
    for old in list_checkpoints(run_dir)[:-keep]:
        remove_folder(old)
    return final


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
            saved = torch.load(folder / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
            optimizer.load_state_dict(saved if shards is None else own_state(saved, shards.parameters))
    else:
        saved = torch.load(folder / "optimizer.pt", map_location=device, weights_only=True)
        optimizer.load_state_dict(saved if shards is None else own_state(saved, shards.parameters))
    return state


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
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{path}: not readable ({error}); delete {folder} to resume from an earlier one") from error
    if values.get("format") != FORMAT:
        raise RunError(f"{path}: format {values.get('format')}, this version of longfit reads {FORMAT}")
    return RunState(**values)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained, by name; a tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _num_bytes(tree: Any) -> int:
    """Add up the bytes of the tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(_num_bytes(value) for value in values)


def remove_folder(folder: Path) -> None:
    """Delete a folder; first it loses its name, so that a kill halfway leaves no half checkpoint."""
    if not folder.exists():
        return
    hidden = folder.with_name(f".{folder.name.lstrip('.')}.removed")
    if hidden.exists():
        shutil.rmtree(hidden)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _flush(folder: Path) -> None:
    """Wait until every file below the folder is on the disk: a rename may reach it before the bytes do."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cannot_save(final: Path, error: Exception, needed: int) -> str:
    earlier = list_checkpoints(final.parent.parent)
    stays = f"{earlier[-1]} stays valid" if earlier else "there is no earlier one"
    advice = "resume the run with --resume" if earlier else "start again in a new --run-dir"
    full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = f"the disk is full, a checkpoint needs {format_bytes(needed)}" if full else str(error)
    return f"{final}: cannot save: {what}; {stays}. Free some space and {advice}"
