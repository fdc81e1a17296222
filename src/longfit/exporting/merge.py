"""Merge an adapter into its base: one model in safetensors that needs neither PEFT nor longfit (QLoRA, section 3).

The adapter was trained on a base in 4 bits, and learned to make up for what those bits lose. Two merges are possible:

    onto 4bit     the de-quantised 4-bit weights plus the adapter: what was trained, rounded once
    onto 16bit    the original weights plus the adapter: better weights, but not those the adapter was trained beside

Which of the two is nearer to the trained model is measured, not believed (evaluation/drift.py), and ``auto`` takes the
nearer one. Tensors pass through memory one at a time: read from the base's mapped file, changed in float32, rounded
once to the dtype of the result, written.

Tied embeddings stay tied as long as both ends are still equal; where the head alone was trained they are written apart,
and the result says so.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from longfit.compat.transformers import tied_weights
from longfit.errors import ExportError
from longfit.evaluation.drift import Drift, Reference, measure_drift, read_reference
from longfit.exporting.base_weights import (
    BaseWeights,
    FolderWeights,
    GrownWeights,
    QuantizedWeights,
    open_base,
    quantized_weights,
)
from longfit.exporting.held_out import HeldOut, held_out_windows
from longfit.exporting.model_folder import write_model_files
from longfit.exporting.result_folder import require_new, result_folder
from longfit.exporting.shards import MAX_SHARD_BYTES, Planned, write_shards
from longfit.exporting.trained import Trained, open_trained
from longfit.model.adapter_weights import AdapterWeights, is_finite
from longfit.model.load import load
from longfit.model.vocabulary import added_rows, tables
from longfit.training.metrics import Event, OnEvent, ignore
from longfit.words import format_bytes

ONTO = ("auto", "16bit", "4bit")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        text: what it was measured on.
        measured_in: dtype that the models computed in for it.
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
    text: str
    measured_in: str
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
        on_event: called for everything worth showing.
    Raises: ExportError: ``out`` exists, the disk is full, the base cannot be read tensor by tensor, or the adapter is
            not plain LoRA. RunError: nothing saved yet. ModelError, DataError: base, adapter or text cannot be read.
    """
    if onto not in ONTO:
        raise ExportError(f"onto {onto!r}: must be one of {', '.join(ONTO)}")
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    out, notify = Path(out), on_event or ignore
    require_new(out)
    trained = open_trained(source, checkpoint=checkpoint, base=base)
    plan = MergePlan.of(trained, dtype=trained.compute_dtype if dtype is None else DTYPES[dtype])
    wanted, reason = _candidates(plan, onto, measure=measure)
    needed = len(wanted) * plan.num_bytes
    with result_folder(out, needed_bytes=needed) as folder:
        for kind in wanted:
            notify(Event("phase", f"merging onto the {kind} base"))
            (folder / kind).mkdir()
            plan.write(folder / kind, kind, max_shard_bytes=max_shard_bytes, on_event=notify)
        found = HeldOut("", (), False)
        drift: tuple[Drift, ...] = ()
        if measure:
            device = choose_device(device)
            notify(Event("phase", "measuring the drift"))
            found = held_out_windows(trained, text, tokens)
            computed_in = drift_dtype(plan, device)
            drift = tuple(_measure(trained, folder, wanted, found, device, computed_in))
        chosen, reason = _choose(wanted, onto, reason, drift)
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
            dtype=_dtype_name(plan.dtype),
            drift=drift,
            text=found.name,
            measured_in=_dtype_name(computed_in) if measure else "",
            warnings=tuple(_warnings(trained, chosen, drift)),
        )
    return result


# ------------------------------------------------------------------------------------------------ the tensors
@dataclass(frozen=True)
class MergePlan:
    """Every tensor of the merged model, and how it is made.

    Attributes:
        config: of the merged model: the positions trained at, no quantisation.
        tensors: in the order of the model.
        aliases: a written tensor that takes its values from the base's tensor of another name: a head that is untied.
        quantized: weights that were in 4 bits while the adapter trained, of those whose originals are there.
        quantizable: weights that ``load`` would put into 4 bits.
        tied: in words.
        no_original: why there is no 16-bit original; empty if there is one.
    """

    trained: Trained
    adapter: AdapterWeights
    base: BaseWeights
    config: Any
    dtype: torch.dtype
    tensors: tuple[Planned, ...]
    aliases: dict[str, str]
    quantized: frozenset[str]
    quantizable: frozenset[str]
    tied: str
    no_original: str

    @classmethod
    def of(cls, trained: Trained, *, dtype: torch.dtype) -> MergePlan:
        """Read everything but the weights.

        Raises: ExportError: base and adapter do not belong together, or the base's files have other names than the
            model's tensors.
        """
        config = AutoConfig.from_pretrained(str(trained.adapter), trust_remote_code=False)
        adapter = AdapterWeights(trained.adapter)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        base = open_base(trained.base, config)
        no_original = ""
        if isinstance(base, FolderWeights) and base.is_quantized:
            no_original = "the base is a 4-bit checkpoint: there are no 16-bit originals"
        if added_rows(config):
            base = GrownWeights(base, {f"{name}.weight" for name in tables(skeleton)}, rows=config.vocab_size)
        shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        tied_to = dict(tied_weights(skeleton))
        untied = {name for name in tied_to if _comes_apart(name, tied_to[name], adapter)}
        written = [name for name in shapes if name not in tied_to or name in untied]
        aliases = {name: tied_to[name] for name in untied if name not in base.names()}
        _require_tensors(trained, base, adapter, shapes, written, aliases)
        if untied:
            config.tie_word_embeddings = False
        quantizable = frozenset(quantized_weights(skeleton))
        return cls(
            trained=trained,
            adapter=adapter,
            base=base,
            config=config,
            dtype=dtype,
            tensors=tuple(Planned(name, shapes[name], dtype) for name in written),
            aliases=aliases,
            quantized=quantizable if trained.quant != "none" and not no_original else frozenset(),
            quantizable=quantizable,
            tied=_say_tied(tied_to, untied),
            no_original=no_original,
        )

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    def kind_of(self, onto: str) -> str:
        """The base to merge onto where nothing is measured: by itself the one that the adapter was trained beside.

        Raises: ExportError: there is no such base.
        """
        if onto not in ONTO:
            raise ExportError(f"onto {onto!r}: must be one of {', '.join(ONTO)}")
        possible, _ = _candidates(self, onto, measure=True)
        return onto if onto in possible else possible[-1]

    def weights(self, kind: str) -> BaseWeights:
        """The base that the adapter is added to."""
        if kind == "16bit" or not self.quantized:
            return self.base
        trained = self.trained
        return QuantizedWeights(
            self.base,
            set(self.quantized),
            quant=trained.quant,
            double_quant=trained.double_quant,
            block_size=trained.block_size,
            int8={f"{name}.weight" for name in trained.int8_modules},
        )

    def make(self, name: str, weights: BaseWeights) -> Tensor:
        """One merged tensor, in ``dtype`` on the CPU."""
        origin = self.aliases.get(name, name)
        merged = self.adapter.apply(name, weights.read(origin)).to(self.dtype)
        if self.dtype == torch.float16 and not is_finite(merged):
            raise ExportError(f"{name}: holds values beyond the range of float16; use --dtype bfloat16")
        return merged

    def tensors_of(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """All merged tensors, one after the other."""
        weights = self.weights(kind)
        for planned in self.tensors:
            yield planned.name, self.make(planned.name, weights)

    def write(
        self, folder: Path, kind: str, *, max_shard_bytes: int = MAX_SHARD_BYTES, on_event: OnEvent = ignore
    ) -> None:
        """Write the merged model into an existing folder."""
        weights = self.weights(kind)

        def tell(done: int, total: int) -> None:
            if done == total:
                on_event(Event("phase", f"  {total} tensors, {format_bytes(self.num_bytes)}"))

        write_shards(
            folder,
            self.tensors,
            lambda planned: self.make(planned.name, weights),
            max_shard_bytes=max_shard_bytes,
            on_tensor=tell,
        )
        write_model_files(folder, self.trained, self.config, dtype=self.dtype)


def _comes_apart(name: str, source: str, adapter: AdapterWeights) -> bool:
    """Whether a tensor that the base ties to another must be written by itself."""
    if name in adapter.low_rank or name in adapter.rows:
        return True
    if name in adapter.whole:
        return not torch.equal(adapter.apply(name, torch.zeros(0)), adapter.apply(source, torch.zeros(0)))
    return source in adapter.changed() and not adapter.ties_embeddings and source in adapter.whole


def _require_tensors(
    trained: Trained,
    base: BaseWeights,
    adapter: AdapterWeights,
    shapes: dict[str, tuple[int, ...]],
    written: list[str],
    aliases: dict[str, str],
) -> None:
    there = set(base.names())
    missing = [name for name in written if aliases.get(name, name) not in there]
    if missing:
        raise ExportError(
            f"{trained.base}: {len(missing)} tensors of the model are not in its files under the model's names, first "
            f"{missing[0]}: this family's files are rearranged when they are loaded, and cannot be merged tensor by "
            "tensor; load the run with PEFT and call merge_and_unload"
        )
    other = [name for name in written if base.shape(aliases.get(name, name)) != shapes[name]]
    if other:
        raise ExportError(
            f"{trained.base}: {other[0]} is {list(base.shape(aliases.get(other[0], other[0])))}, the trained model has "
            f"{list(shapes[other[0]])}; this is another base"
        )
    lost = sorted(adapter.changed() - shapes.keys())
    if lost:
        raise ExportError(
            f"{trained.adapter}: {len(lost)} of its tensors belong to nothing in the base, first {lost[0]}; it was "
            "trained on another base"
        )


def _say_tied(tied_to: dict[str, str], untied: set[str]) -> str:
    if not tied_to:
        return "output head and embeddings are separate, as in the base"
    if untied:
        return f"untied: {', '.join(sorted(untied))} was trained apart from the embeddings and is written by itself"
    return "output head and embeddings are tied, as in the base"


# ------------------------------------------------------------------------------------------------ which of the two
def _candidates(plan: MergePlan, onto: str, *, measure: bool) -> tuple[list[str], str]:
    """The merges to make, and the reason where only one is possible."""
    if plan.no_original:
        if onto == "16bit":
            raise ExportError(f"onto 16bit: {plan.no_original}; use --onto 4bit, or give the original with --base")
        return ["4bit"], plan.no_original
    if not plan.quantized:
        if onto == "4bit":
            raise ExportError("onto 4bit: the adapter was trained on a base that was not quantised; use --onto 16bit")
        return ["16bit"], "the base was not quantised while training"
    if not measure:
        return ["16bit" if onto == "auto" else onto], "not measured"
    return ["16bit", "4bit"], ""


def _choose(wanted: list[str], onto: str, reason: str, drift: tuple[Drift, ...]) -> tuple[str, str]:
    if len(wanted) == 1:
        return wanted[0], reason
    rows = {row.name: row for row in drift}
    nearest = min(wanted, key=lambda kind: rows[f"merged onto {kind}"].kl)
    if onto != "auto":
        return onto, "asked for" if onto == nearest else f"asked for, although onto {nearest} drifts less"
    best = min(wanted, key=lambda kind: rows[f"merged onto {kind}"].perplexity)
    aside = "" if best == nearest else f", though onto {best} reads this text with the lower perplexity"
    return nearest, f"it drifts less{aside}"


def _measure(
    trained: Trained, folder: Path, wanted: list[str], text: HeldOut, device: torch.device, dtype: torch.dtype
) -> Iterator[Drift]:
    """The trained model, the base without its adapter, and each merge as it lies on the disk."""
    model, _ = trained.load(device, dtype=dtype)
    reference = read_reference(model, text.windows)
    name = "adapter on the 4-bit base" if trained.quant != "none" else "adapter on its base"
    yield measure_drift(name, model, reference)
    with model.disable_adapter():
        yield measure_drift("that base without the adapter", model, reference)
    del model
    for kind in wanted:
        yield measure_folder(f"merged onto {kind}", folder / kind, reference, device, dtype)


def measure_folder(name: str, folder: Path, reference: Reference, device: torch.device, dtype: torch.dtype) -> Drift:
    """Measure a model in a folder (or a ``.gguf`` file) as anybody would load it."""
    model, _ = load(folder, quant="none", dtype=dtype, device=device)
    return measure_drift(name, model, reference)


def choose_device(device: torch.device | None) -> torch.device:
    """Where to measure: as asked for, else on a card if there is one."""
    return device or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def drift_dtype(plan: MergePlan, device: torch.device) -> torch.dtype:
    """float32 where it fits, so that the drift is that of the weights alone.

    Two runs of one model in bfloat16 that only add in another order differ by more than a careful merge changes (KL
    7e-3 for SmolLM2-135M); but a large model in float32 may not fit, and then the run's own dtype has to do.
    """
    count = sum(math.prod(tensor.shape) for tensor in plan.tensors)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil  # type: ignore[import-untyped]

        free = psutil.virtual_memory().available
    return torch.float32 if 2 * 4 * count < free else plan.trained.compute_dtype


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _warnings(trained: Trained, chosen: str, drift: tuple[Drift, ...]) -> Iterator[str]:
    rows = {row.name: row for row in drift}
    merged, untrained = rows.get(f"merged onto {chosen}"), rows.get("that base without the adapter")
    if merged is not None and untrained is not None and merged.kl >= untrained.kl:
        yield (
            f"the merged model is as far from the trained one (KL {merged.kl:.2g}) as the base without its adapter "
            f"(KL {untrained.kl:.2g}): what training changed is smaller than what the merge changed; "
            + ("use --onto 4bit" if chosen == "16bit" and len(rows) > 3 else "serve base and adapter instead")
        )
    if trained.config is None and trained.quant != "none":
        yield (
            f"{trained.path} is an adapter without a run: its base is taken to have been in {trained.quant} with "
            "double quantisation while it trained"
        )
