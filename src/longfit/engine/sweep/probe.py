"""What the layers of a model do to their tokens, found by running seven of them: nothing is believed for its name.

Two documents, of four and three tokens, go through the decoder once. Every *kind* of layer is then tried on its own
input, in float32, so that no rounding hides or feigns a difference:

    causal    another last token changes nothing before it
    packs     another first document changes nothing in the second
    sweeps    the layer in tiles of three tokens gives what it gives whole

Layers are of one kind when they have the same modules with the same plain settings. A layer that hands something on to
later ones in a mapping (keys and values that several layers share) is seen by what it does to the mapping.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from longfit.compat.transformers import attention_of, set_checkpoint_function
from longfit.engine.hf_model import base_model, decoder, last_norm, output_head
from longfit.engine.model_state import preserve_state
from longfit.engine.sweep.layer_call import LayerCall, layer_call
from longfit.engine.sweep.layer_probe import (
    CUT,
    NUM_TOKENS,
    SAME,
    SAME_ROUNDED,
    LayerNature,
    PlainAttention,
    has_values,
    kind_of,
    layer_nature,
    run_as_swept,
    same,
    takes_keywords,
)
from longfit.engine.sweep.recompute_state import preserve_random_state
from longfit.errors import ModelError

HEAD_ROWS = 4096
"""Rows of the output matrix that are in float32 at once."""


@dataclass(frozen=True)
class ModelNature:
    """What was found about a model.

    Attributes:
        layers: those that are run through the gradient-checkpointing function, in order.
        packs: None, or why packed documents see each other somewhere in the model.
        packs_swept: the same while its layers are swept.
        causal: None, or where tokens see later ones.
        head: None, or that the logits are not those of the output matrix as longfit reads it.
        ends_in_norm: whether the decoder's last hidden states are what its last norm returned.
    """

    layers: dict[nn.Module, LayerNature]
    packs: str | None = None
    causal: str | None = None
    head: str | None = None
    ends_in_norm: bool = False
    packs_swept: str | None = None

    def require_head(self) -> None:
        """Raise ModelError unless longfit knows how logits are made."""
        if self.head is not None:
            raise ModelError(f"{self.head}; train this model with its own loss")


Present = Callable[[nn.Module], AbstractContextManager[None]]


def probe_model(base: Any, inner: Any, device: torch.device, *, present: Present | None = None) -> ModelNature:
    """Run seven tokens through a decoder three times, and try each kind of its layers; the model is left as it was.

    Args:
        base, inner: the model and its decoder.
        device: where the model computes.
        present: holds the weights of a layer while it runs; None when they are all in their place.
    """
    probe = _Probe(present or (lambda _: nullcontext()))
    names = {module: name for name, module in base.named_modules()}
    takes = "position_ids" in inspect.signature(inner.forward).parameters
    run = partial(_run, base, inner, device, probe, positions=takes and has_values(inner))
    head_present = probe.present(base.get_output_embeddings())
    with (
        _checkpointing(base, inner, probe.checkpoint_function),
        preserve_random_state(device),
        _named(base),
        head_present,
    ):
        one = run()
        first, last = run(other=slice(0, CUT)), run(other=slice(NUM_TOKENS - 1, NUM_TOKENS))
        head = _why_not_head(base, one) if has_values(inner) else None
        natures = probe.result()
        packs = _packs(inner, names, {layer: nature.packs for layer, nature in natures.items()}, probe, one, first)
        packs_swept = packs
        if any(nature.packs is not None and nature.packs_swept is None for nature in natures.values()):
            probe.swept = True
            one_swept, first_swept = run(), run(other=slice(0, CUT))
            reasons = {layer: nature.packs_swept for layer, nature in natures.items()}
            packs_swept = _packs(inner, names, reasons, probe, one_swept, first_swept)
    causal = _first(names, {layer: nature.causal for layer, nature in natures.items()})
    if causal is None and not same(one.hidden, last.hidden, slice(0, NUM_TOKENS - 1)):
        causal = f"{type(inner).__name__} lets tokens see later ones"
    return ModelNature(natures, packs, causal, head, one.ends_in_norm, packs_swept)


def _packs(
    inner: Any,
    names: dict[nn.Module, str],
    reasons: dict[nn.Module, str | None],
    probe: "_Probe",
    one: "_Result",
    first: "_Result",
) -> str | None:
    """Why packed documents see each other, in a layer or outside: in a second run the first document was another."""
    name = type(inner).__name__
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return f"{name} takes no position_ids, by which documents are told apart"
    found, entered = _first(names, reasons), probe.first_inputs
    if found is None and len(entered) >= 2 and not same(entered[0], entered[1]):
        return f"{name} mixes tokens before its first layer"
    if found is None and not same(one.hidden, first.hidden):
        return f"{name} lets packed documents see each other outside of its layers"
    return found


@dataclass
class _Probe:
    """Stands in for torch's checkpoint: runs every layer, and in the first of the runs tries those of a new kind."""

    present: Present
    num_runs: int = 0
    first_inputs: list[Tensor] = field(default_factory=list)
    natures: dict[nn.Module, LayerNature] = field(default_factory=dict)
    kinds: dict[Any, LayerNature] = field(default_factory=dict)
    mappings: dict[nn.Module, dict[str, int]] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)
    swept: bool = False

    def checkpoint_function(self, function: Any, *args: Any) -> Any:
        if not isinstance(function, partial) or not function.args or not isinstance(function.args[0], nn.Module):
            return function(*args)
        call, hidden = layer_call(function, args)
        if len(self.first_inputs) < self.num_runs:
            self.first_inputs.append(hidden.detach().clone())
        with torch.no_grad(), self.present(call.layer):
            if self.swept and call.layer in self.natures:
                return run_as_swept(self.natures[call.layer], call, hidden)
            if self.num_runs == 1:
                self._try(call, hidden)
            return self._watched(call, hidden)

    def _try(self, call: LayerCall, hidden: Tensor) -> None:
        kind = kind_of(call)
        if kind not in self.kinds:
            self.kinds[kind] = layer_nature(call, hidden)
        self.natures[call.layer] = self.natures.get(call.layer, LayerNature()).and_also(self.kinds[kind])

    def _watched(self, call: LayerCall, hidden: Tensor) -> Any:
        """Run the layer, and see what it does to the mappings that it is given."""
        given = {name: value for name, value in call.keywords.items() if isinstance(value, (MutableMapping, list))}
        before = {name: _content(value) for name, value in given.items()}
        counted = {} if has_values(call.layer) or not takes_keywords(call) else {"sweep": PlainAttention()}
        out = call.function(call.layer, hidden, *call.args, **call.keywords, **counted)
        self.changed |= {id(value) for name, value in given.items() if _content(value) != before[name]}
        self.mappings.setdefault(call.layer, {}).update({name: id(value) for name, value in given.items()})
        return out

    def result(self) -> dict[nn.Module, LayerNature]:
        """The natures, with what layers share."""
        for layer, given in self.mappings.items():
            shared = sorted(name for name, identity in given.items() if identity in self.changed)
            if shared and layer in self.natures:
                reason = f"its {shared[0]} is written by one layer and read by others, which the sweep does not follow"
                self.natures[layer] = LayerNature(sweeps=reason).and_also(self.natures[layer])
        return self.natures


def _content(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _content(part) for key, part in value.items()}
    return [_content(part) for part in value] if isinstance(value, (list, tuple)) else id(value)


# ------------------------------------------------------------------------------------------------ the whole model
@contextmanager
def _named(base: Any) -> Iterator[None]:
    """Say of an error inside a model that it is longfit's attention that the model does not run with."""
    try:
        yield
    except (TypeError, AttributeError, IndexError, KeyError, ValueError, RuntimeError) as error:
        attention = attention_of(base)
        if isinstance(error, ModelError) or not attention.startswith("longfit-"):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{type(base).__name__} does not run with attention {attention!r}: {reason}") from error


@dataclass(frozen=True)
class _Result:
    """What a run of the whole model gave."""

    hidden: Tensor  # [1, T, D]
    logits: Tensor  # [1, T, V]
    ends_in_norm: bool


def _run(
    base: Any, inner: Any, device: torch.device, probe: _Probe, *, positions: bool, other: slice = slice(0, 0)
) -> _Result:
    """Run a model on two packed documents, with other tokens in one place.

    Raises: ModelError: it does not run with longfit's attention.
    """
    probe.num_runs += 1
    vocab_size = inner.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids, others = torch.randint(min(8, vocab_size - 1), vocab_size, (2, 1, NUM_TOKENS), generator=draw)
    ids[:, other] = others[:, other]
    starts = torch.cat([torch.arange(CUT), torch.arange(NUM_TOKENS - CUT)])[None]
    given = {"position_ids": starts.to(device)} if positions else {}
    hidden: list[Tensor] = []
    normed: list[Any] = []
    norm = last_norm(inner)
    hooks = [inner.register_forward_hook(lambda *call: hidden.append(call[2].last_hidden_state))]
    if norm is not None:
        hooks.append(norm.register_forward_hook(lambda *call: normed.append(call[2])))
    try:
        logits = base(input_ids=ids.to(device), use_cache=False, **given).logits
    finally:
        for hook in hooks:
            hook.remove()
    return _Result(hidden[-1].detach(), logits.detach(), len(normed) == 1 and normed[0] is hidden[-1])


def _why_not_head(base: Any, result: _Result) -> str | None:
    """Make the logits of a run as the tiled loss does, and compare."""
    try:
        head = output_head(base)
    except ModelError as error:
        return str(error)
    if head.weight.shape[1] != result.hidden.shape[-1]:
        wrong = f"takes {head.weight.shape[1]} numbers, not {result.hidden.shape[-1]}"
        return f"{type(base).__name__}: its output matrix {wrong}"
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    hidden = result.hidden.to(wide)
    # some rows at a time: the matrix whole in float32 would be the largest tensor of a small model
    logits = torch.cat([hidden @ rows.to(wide).t() for rows in head.weight.split(HEAD_ROWS)], dim=-1)
    logits = (logits + (0 if head.bias is None else head.bias)) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    found = result.logits[..., : logits.shape[-1]].to(logits)
    allowed = SAME_ROUNDED.get(result.logits.dtype, SAME)
    if found.shape != logits.shape or bool((logits - found).norm() > allowed * found.norm()):
        return f"{type(base).__name__} makes its logits in a way that longfit does not know"
    return None


def _first(names: dict[nn.Module, str], reasons: dict[nn.Module, str | None]) -> str | None:
    found = [(layer, reason) for layer, reason in reasons.items() if reason is not None]
    if not found:
        return None
    more = f" ({len(found)} such layers)" if len(found) > 1 else ""
    return f"{names.get(found[0][0], '?')}: {found[0][1]}{more}"


@contextmanager
def _checkpointing(base: Any, inner: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Have every layer run through a function, without dropout; afterwards everything as it was."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    with preserve_state(base), torch.enable_grad():  # without gradients some versions do not call the function
        base.eval()
        if base.supports_gradient_checkpointing:
            set_checkpoint_function(base, function)
        for module in inner.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # the layer alone: its dropout modules stay in their mode
        yield


# ------------------------------------------------------------------------------------------------ found once
_FOUND: WeakKeyDictionary[nn.Module, dict[str, "ModelNature | ModelError"]] = WeakKeyDictionary()
"""What was found, by model and attention: a cache of what a probe finds again, which lives as long as the model."""


def nature_of(
    model: nn.Module, *, present: Present | None = None, device: torch.device | None = None, again: bool = False
) -> ModelNature:
    """What a model does to its tokens with the attention it has now; probed when first asked, or ``again``.

    Raises: ModelError: no causal language model, or one that does not run with that attention.
    """
    base, inner = base_model(model), decoder(model)
    known, attention = _FOUND.setdefault(base, {}), attention_of(base)
    if again or attention not in known:
        device = device or inner.get_input_embeddings().weight.device
        try:
            known[attention] = probe_model(base, inner, device, present=present)
        except ModelError as error:
            known[attention] = error.with_traceback(None)
    found = known[attention]
    if isinstance(found, ModelError):
        raise found
    return found
