"""Every tensor of a merged model and how it is made, known before any weight is read.

Tensors pass through memory one at a time: read from the base's mapped file, changed in float32, rounded once to the
dtype of the result. Tied embeddings stay tied as long as both ends are still equal; where the head alone was trained
they are written apart, and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from longfit.compat.transformers import tied_weights
from longfit.compat.transformers_experts import experts_layout
from longfit.errors import ExportError
from longfit.exporting.base_weights import (
    BaseWeights,
    FolderWeights,
    GrownWeights,
    HeldWeights,
    QuantizedWeights,
    conv1d_weights,
    open_base,
    quantized_experts,
    quantized_weights,
)
from longfit.exporting.model_folder import write_model_files
from longfit.exporting.rearranged import RearrangedWeights
from longfit.exporting.shards import MAX_SHARD_BYTES, Planned, write_shards
from longfit.exporting.trained import Trained
from longfit.model.accounting import is_finite
from longfit.model.adapter_weights import AdapterWeights, Experts
from longfit.model.description import read_config
from longfit.model.vocabulary import added_rows, tables
from longfit.training.metrics import Event, OnEvent, ignore
from longfit.words import format_bytes

ONTO = ("auto", "16bit", "4bit")


@dataclass(frozen=True)
class MergePlan:
    """Every tensor of the merged model, and how it is made.

    Attributes:
        config: of the merged model: the positions trained at, no quantisation.
        tensors: in the order of the model.
        aliases: a written tensor that takes its values from the base's tensor of another name: a head that is untied.
        quantized: weights that were in 4 bits while the adapter trained, of those whose originals are there.
        quantizable: weights of layers that ``load`` would put into 4 bits.
        transposed: weights ``[I, O]`` of transformers' ``Conv1D``.
        tied: in words.
        comes_apart: whether the output head is written apart from the embeddings that the base ties it to.
        no_original: why there is no 16-bit original; empty if there is one.
        stored_in_few_bits: weights that the base's own files have in 4 bits.
        rearranged: the base, where its files have other tensors than the model; None where they have the same.
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
    transposed: frozenset[str]
    tied: str
    comes_apart: bool
    no_original: str
    stored_in_few_bits: frozenset[str] = frozenset()
    rearranged: RearrangedWeights | None = None

    @classmethod
    def of(cls, trained: Trained, *, dtype: torch.dtype) -> MergePlan:
        """Read everything but the weights.

        Raises: ExportError: base and adapter do not belong together, or the base's files have other names than the
            model's tensors.
        """
        config = read_config(trained.adapter)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        adapter = AdapterWeights(trained.adapter, experts=stacked_experts(skeleton))
        base = open_base(trained.base, config)
        no_original, stored = "", frozenset[str]()
        if isinstance(base, FolderWeights) and base.in_few_bits:
            stored = base.in_few_bits
            no_original = "the base is a 4-bit checkpoint: there are no 16-bit originals"
        rearranged = None
        if not set(skeleton.state_dict()) - set(tied_weights(skeleton)) <= set(base.names()):
            stored |= set(skeleton.state_dict()) - set(base.names()) if stored else set()  # made of such tensors
            base = rearranged = RearrangedWeights(base, skeleton)
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
        in_few_bits = quantizable | quantized_experts(skeleton)
        return cls(
            trained=trained,
            adapter=adapter,
            base=base,
            config=config,
            dtype=dtype,
            tensors=tuple(Planned(name, shapes[name], dtype) for name in written),
            aliases=aliases,
            quantized=in_few_bits if trained.quant != "none" and not no_original else frozenset(),
            quantizable=quantizable,
            transposed=conv1d_weights(skeleton),
            tied=_say_tied(tied_to, untied),
            comes_apart=bool(untied),
            no_original=no_original,
            stored_in_few_bits=stored,
            rearranged=rearranged,
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
        possible, _ = kinds(self, onto, measure=True)
        return onto if onto in possible else possible[-1]

    def weights(self, kind: str) -> BaseWeights:
        """The base that the adapter is added to."""
        if kind == "16bit":
            return self.base
        trained = self.trained
        held = HeldWeights(self.base, trained.compute_dtype, in_few_bits=self.stored_in_few_bits)
        if not self.quantized:
            return held
        return QuantizedWeights(
            held,
            set(self.quantized),
            quant=trained.quant,
            double_quant=trained.double_quant,
            block_size=trained.block_size,
            int8={f"{name}.weight" for name in trained.int8_modules},
            transposed=self.transposed,
        )

    def make(self, name: str, weights: BaseWeights) -> Tensor:
        """One merged tensor, in ``dtype`` on the CPU."""
        origin = self.aliases.get(name, name)
        # What is read is nobody's but the adapter's: held here too, it would be a third matrix in memory.
        if name in self.transposed:
            merged = self.adapter.apply(name, weights.read(origin).t()).t().contiguous().to(self.dtype)
        else:
            merged = self.adapter.apply(name, weights.read(origin)).to(self.dtype)
        if self.dtype == torch.float16 and not is_finite(merged):
            raise ExportError(f"{name}: holds values beyond the range of float16; use --dtype bfloat16")
        return merged

    def write(
        self, folder: Path, kind: str, *, max_shard_bytes: int = MAX_SHARD_BYTES, on_event: OnEvent = ignore
    ) -> None:
        """Write the merged model into an existing folder."""
        weights = self.weights(kind)

        def tell(done: int, total: int) -> None:
            if done == total:
                on_event(Event("phase", f"  {total} tensors, {format_bytes(self.num_bytes)}"))

        files: Sequence[Planned] = self.tensors
        make: Callable[[Planned], Tensor] = lambda planned: self.make(planned.name, weights)  # noqa: E731
        if self.rearranged is not None:
            files, make = self.rearranged.in_files(self.tensors, lambda name: self.make(name, weights))
        write_shards(folder, files, make, max_shard_bytes=max_shard_bytes, on_tensor=tell)
        write_model_files(folder, self.trained, self.config, dtype=self.dtype)


def stacked_experts(skeleton: nn.Module) -> dict[str, Experts]:
    """A model's modules of stacked experts that can have adapters, by name."""
    layouts = ((path, experts_layout(module)) for path, module in skeleton.named_modules())
    return {path: Experts(found.weights, found.transposed) for path, found in layouts if found is not None}


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
            f"{missing[0]}, nor are they made of others; this is another base"
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


def kinds(plan: MergePlan, onto: str, *, measure: bool) -> tuple[list[str], str]:
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
