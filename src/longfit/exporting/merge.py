"""Merge an adapter into its base: one model in safetensors that needs neither PEFT nor longfit (QLoRA, section 3).

The adapter was trained on a base in 4 bits, and learned to make up for what those bits lose. Two merges are possible:

    onto 4bit     the de-quantised 4-bit weights plus the adapter: what was trained, rounded once
    onto 16bit    the original weights plus the adapter: better weights, but not those the adapter was trained beside

Which of the two is nearer to the trained model is measured, not believed (evaluation/drift.py), and ``auto`` takes the
nearer one. That it is the trained model is proven before it appears (``proof.py``).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from longfit.config import RunConfig
from longfit.errors import ExportError
from longfit.evaluation.drift import Drift, Reference
from longfit.exporting.measuring import DriftTable
from longfit.exporting.merge_plan import ONTO, MergePlan, kinds
from longfit.exporting.proof import Proof
from longfit.exporting.result_folder import require_new, result_folder
from longfit.exporting.shards import MAX_SHARD_BYTES
from longfit.exporting.trained import Trained, open_trained
from longfit.training.metrics import Event, OnEvent, ignore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEVELS = {torch.float32: 0, torch.bfloat16: 2**8, torch.float16: 2**11}
"""Steps of each dtype below a value, for ``proof.py``."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge made.

    Attributes:
        out: the folder.
        onto: ``"16bit"`` or ``"4bit"``.
        reason: why that one.
        tied: what became of the output head and the embeddings.
        changed: tensors that the adapter changed, of ``num_tensors``.
        num_bytes: of all tensors.
        dtype: of the weights.
        drift: the trained model first, then the base without its adapter, then each merge; empty if not measured.
        proof: how far the result is from what it should hold; None if not measured.
        text: what it was measured on, and in which dtype.
        warnings: what the user should know.
    """

    out: Path
    onto: str
    reason: str
    tied: str
    changed: int
    num_tensors: int
    num_bytes: int
    dtype: str
    drift: tuple[Drift, ...]
    proof: Proof | None
    text: str
    warnings: tuple[str, ...]


def merge(
    source: str | Path,
    out: str | Path,
    *,
    onto: str = "auto",
    checkpoint: str | None = None,
    base: str | None = None,
    dtype: str | None = None,
    text: str | None = None,
    tokens: int = 2048,
    measure: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    device: torch.device | None = None,
    config: RunConfig | None = None,
    on_event: OnEvent | None = None,
) -> MergeResult:
    """Merge a run's adapter into its base.

    Args:
        source: a run directory, or an adapter folder.
        out: the folder to make; must not exist.
        onto: ``"16bit"``, ``"4bit"``, or ``"auto"``: the one that drifts less.
        checkpoint: of a run; default its result.
        base: where the base is now, if it has moved.
        dtype: of the result: ``"bfloat16"``, ``"float16"`` or ``"float32"``; default what the run computed in.
        text: a file or folder to measure the drift on; default the run's held-out text, else one that Python carries.
        tokens: of it.
        measure: False makes only the one asked for and measures nothing; ``"auto"`` then means ``"16bit"``.
        max_shard_bytes: largest file.
        device: to measure on; default a CUDA device if there is one.
        config: the run's settings, with changes to how the text is read; None for its own.
        on_event: called for everything worth showing.
    Raises: ExportError: ``out`` exists, the disk is full, the base cannot be read tensor by tensor, the adapter is not
            plain LoRA, or the result is not the trained model. RunError: nothing saved yet. ModelError, DataError:
            base, adapter or text cannot be read.
    """
    if onto not in ONTO:
        raise ExportError(f"onto {onto!r}: must be one of {', '.join(ONTO)}")
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    out, notify = Path(out), on_event or ignore
    require_new(out)
    trained = open_trained(source, checkpoint=checkpoint, base=base, config=config)
    plan = MergePlan.of(trained, dtype=trained.compute_dtype if dtype is None else DTYPES[dtype])
    wanted, reason = kinds(plan, onto, measure=measure)
    with result_folder(out, needed_bytes=len(wanted) * plan.num_bytes) as folder:
        for kind in wanted:
            notify(Event("phase", f"merging onto the {kind} base"))
            (folder / kind).mkdir()
            plan.write(folder / kind, kind, max_shard_bytes=max_shard_bytes, on_event=notify)
        table, proof = None, None
        chosen = wanted[0]
        if measure:
            table = DriftTable.begin(plan.trained, text, tokens, device, notify)
            chosen, found = _nearest(table, folder, wanted, onto)
            reason = reason or _reason(table, onto, chosen)
            levels = LEVELS[plan.dtype]
            proof = table.prove(plan, found, chosen, lambda name, weight: weight.to(plan.dtype), levels=levels)
            proof.require(f"{out}: merged onto {chosen}")
        for path in list((folder / chosen).iterdir()):
            path.rename(folder / path.name)
        for kind in wanted:
            shutil.rmtree(folder / kind)
        result = MergeResult(
            out=out,
            onto=chosen,
            reason=reason,
            tied=plan.tied,
            changed=len(plan.adapter.changed()),
            num_tensors=len(plan.tensors),
            num_bytes=plan.num_bytes,
            dtype=str(plan.dtype).removeprefix("torch."),
            drift=() if table is None else tuple(table.rows),
            proof=proof,
            text="" if table is None else table.about,
            warnings=tuple(_warnings(trained, chosen, table)),
        )
    return result


def _nearest(table: DriftTable, folder: Path, wanted: list[str], onto: str) -> tuple[str, Reference]:
    """Measure each merge; return the one to keep, which was asked for or drifts less, and what it said."""
    chosen, least, said = "", float("inf"), None
    for kind in wanted:
        found = table.add(_name(kind), folder / kind)
        kl = table.rows[-1].kl
        if said is None or kind == onto or (onto == "auto" and kl < least):
            chosen, least, said = kind, kl, found
    assert said is not None
    return chosen, said


def _name(kind: str) -> str:
    return f"merged onto {kind}"


def _reason(table: DriftTable, onto: str, chosen: str) -> str:
    rows = {row.name: row for row in table.rows[2:]}
    nearest = min(rows.values(), key=lambda row: row.kl).name
    if onto != "auto":
        return (
            "asked for"
            if nearest == _name(onto)
            else f"asked for, although {nearest.removeprefix('merged ')} drifts less"
        )
    best = min(rows.values(), key=lambda row: row.perplexity).name
    aside = f", though {best.removeprefix('merged ')} reads this text with the lower perplexity"
    return f"it drifts less{aside if best != _name(chosen) else ''}"


def _warnings(trained: Trained, chosen: str, table: DriftTable | None) -> Iterator[str]:
    if table is not None:
        other = len(table.rows) > 3 and chosen == "16bit"
        yield from table.warnings(_name(chosen), "use --onto 4bit" if other else "serve base and adapter instead")
    if trained.config is None and trained.quant != "none":
        yield (
            f"{trained.path} is an adapter without a run: its base is taken to have been in {trained.quant} with "
            "double quantisation while it trained"
        )
