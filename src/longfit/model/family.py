"""What longfit understands of a model, in one place: found by running and reading it, nothing believed for its name.

    what mixes tokens     engine/sweep/probe.py     decides what is swept and what is packed
    which mask            attention/mask_reading.py, as the layers' attention asked for it
    the head              engine/hf_model.py        held against the model's own logits
    what cannot adapt     model/adapter_targets.py  layers that all-linear leaves out
    where experts are     compat/transformers_experts.py

``longfit doctor MODEL`` prints it, and a run keeps it as ``family.json``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from torch import nn

from longfit.compat.transformers import attention_of, tied_weights
from longfit.compat.transformers_experts import experts_layout
from longfit.engine.hf_model import base_model, decoder, output_head
from longfit.engine.sweep.layer_probe import LayerNature
from longfit.engine.sweep.probe import ModelNature, Present, nature_of
from longfit.errors import ModelError
from longfit.layers.experts import packed_experts
from longfit.layers.quantized_linear import QuantizedLinear
from longfit.model.adapter_targets import untargeted


@dataclass(frozen=True)
class LayerKind:
    """Layers that are alike.

    Attributes:
        layers: their names.
        module: their class.
        attends: what they ask of longfit's attention, in words; "" where they do not use it.
        carries: the state that they carry from tile to tile, in words; "" for none.
        sweeps, packs, packs_swept, causal: None, or why not (``LayerNature``).
    """

    layers: tuple[str, ...]
    module: str
    attends: str
    sweeps: str | None
    packs: str | None
    causal: str | None
    carries: str = ""
    packs_swept: str | None = None

    def __str__(self) -> str:
        """Say it in a line, and one more for each thing that is not possible."""
        more = f" and {len(self.layers) - 1} more" if len(self.layers) > 1 else ""
        lines = [f"{self.layers[0]}{more} ({self.module}): {self.attends or 'no attention of the interface'}"]
        swept = f"  swept, carrying {self.carries}" if self.carries else "  swept"
        lines.append(swept if self.sweeps is None else f"  checkpointed in the ordinary way: {self.sweeps}")
        lines += [f"  {reason}" for reason in (self.causal, self.packs_swept) if reason is not None]
        return "\n".join(lines)


@dataclass(frozen=True)
class Family:
    """What is understood of a model.

    Attributes:
        model_type: of its configuration.
        model, decoder: classes of the whole, and of the part that is trained.
        attention: the implementation that it runs with.
        layers: the kinds of its layers, in order.
        packs: None, or why documents do not share a window.
        packs_swept: the same while the layers are swept.
        causal: None, or where tokens see later ones: then it is not trained.
        head: how logits are made, or why longfit does not know.
        head_known: whether it does.
        tied: whether the output matrix is the embedding.
        experts: kinds of stacked experts: module class -> how many, in words.
        quantised: linear layers in few bits, and of how many.
        no_adapter: layers that all-linear leaves out, by name, and why.
    """

    model_type: str
    model: str
    decoder: str
    attention: str
    layers: tuple[LayerKind, ...]
    packs: str | None
    causal: str | None
    head: str
    head_known: bool
    tied: bool
    experts: dict[str, str] = field(default_factory=dict)
    quantised: tuple[int, int] = (0, 0)
    no_adapter: dict[str, str] = field(default_factory=dict)
    packs_swept: str | None = None

    def mixing(self, engine: str) -> str | None:
        """Why documents do not share a window with an engine (``"sweep"`` or ``"plain"``); None where they do."""
        return self.packs_swept if engine == "sweep" else self.packs

    def require_trainable(self) -> None:
        """Raise ModelError naming what is not understood."""
        if self.causal is not None:
            raise ModelError(f"{self.causal}: longfit trains models in which a token sees only what comes before it")
        if not self.head_known:
            raise ModelError(f"{self.head}; train this model with its own loss")

    def to_json(self) -> str:
        """As ``family.json`` has it."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def __str__(self) -> str:
        """Say it in a screen."""
        inner = "" if self.decoder == self.model else f", decoder {self.decoder}"
        lines = [f"family     {self.model_type}: {self.model}{inner}", f"attention  {self.attention}"]
        for kind in self.layers:
            first, *more = str(kind).splitlines()
            lines += [f"layers     {first}", *(f"           {line}" for line in more)]
        if not self.layers:
            lines.append("layers     do not call the gradient-checkpointing function: trained without checkpointing")
        lines += [f"experts    {name}: {words}" for name, words in self.experts.items()]
        lines.append(f"packing    {self._packing()}")
        lines.append(f"head       {self.head}{', tied to the embedding' if self.tied and self.head_known else ''}")
        if self.quantised[0]:
            lines.append(f"quantised  {self.quantised[0]} of {self.quantised[1]} linear layers")
        for reason in dict.fromkeys(self.no_adapter.values()):
            names = [name for name, why in self.no_adapter.items() if why == reason]
            rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
            lines.append(f"no adapter {', '.join(names[:2])}{rest}: {reason}")
        if self.causal is not None:
            lines.append(f"refused    {self.causal}")
        return "\n".join(lines)

    def _packing(self) -> str:
        if self.packs_swept is not None:
            return f"one document a window: {self.packs_swept}"
        if self.packs is not None:
            begun = "swept layers begin each document without a state"
            return f"documents share windows where {begun}; where layers run whole one a window: {self.packs}"
        return "documents share windows"


def understand(model: nn.Module, *, nature: ModelNature | None = None, present: Present | None = None) -> Family:
    """Run seven tokens through a model, read the rest, and say what it is.

    Args:
        model: a transformers causal language model, or a PeftModel around one, with the attention that it trains with.
        nature: what a probe found, where one has run.
        present: holds the weights of a layer while it runs; None when they are all in their place.
    Raises: ModelError: no causal language model, or one that does not run with its attention.
    """
    nature = nature or nature_of(model, present=present)
    base, inner = base_model(model), decoder(model)
    head, known = _head(model, nature)
    linears = [m for m in inner.modules() if isinstance(m, (nn.Linear, QuantizedLinear))]
    return Family(
        model_type=str(base.config.model_type),
        model=type(base).__name__,
        decoder=type(inner).__name__,
        attention=attention_of(base),
        layers=_kinds(base, nature),
        packs=nature.packs,
        causal=nature.causal,
        head=head,
        head_known=known,
        tied=bool(tied_weights(base)),
        experts=_experts(inner),
        quantised=(sum(isinstance(m, QuantizedLinear) for m in linears), len(linears)),
        no_adapter=untargeted(base),
        packs_swept=nature.packs_swept,
    )


def _kinds(base: nn.Module, nature: ModelNature) -> tuple[LayerKind, ...]:
    names = {module: name for name, module in base.named_modules()}
    kinds: dict[tuple[str, LayerNature], list[str]] = {}
    for layer, found in nature.layers.items():
        kinds.setdefault((type(layer).__name__, found), []).append(names.get(layer, "?"))
    return tuple(
        LayerKind(
            tuple(layers),
            module,
            found.attends,
            found.sweeps,
            found.packs,
            found.causal,
            found.carrying.state if found.carrying is not None else "",
            found.packs_swept,
        )
        for (module, found), layers in kinds.items()
    )


def _head(model: nn.Module, nature: ModelNature) -> tuple[str, bool]:
    """How logits are made, and whether that is known."""
    if nature.head is not None:
        return nature.head, False
    head = output_head(model)
    words = [f"{head.weight.shape[0]:,} rows of {head.weight.shape[1]:,}"]
    words += ["a bias"] if head.bias is not None else []
    words += [f"logits times {head.scale:g}"] if head.scale != 1 else []
    words += [f"logits capped at {head.softcap:g}"] if head.softcap is not None else []
    words += [] if nature.ends_in_norm else ["the last norm over the whole sequence"]
    return ", ".join(words), True


def _experts(inner: nn.Module) -> dict[str, str]:
    """Stacked experts by their class."""
    found: dict[str, list[tuple[int, bool]]] = {}
    for module in inner.modules():
        packed, layout = packed_experts(module), experts_layout(module)
        if layout is None:
            continue
        count = module.get_parameter(layout.weights[0]).shape[0]
        found.setdefault(type(module).__name__, []).append((count, packed is not None))
    return {
        name: f"{each[0][0]} in each of {len(each)} layers{', in few bits' if each[0][1] else ''}"
        for name, each in found.items()
    }
