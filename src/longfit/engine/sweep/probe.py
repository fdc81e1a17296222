"""What the layers of a model do to their tokens, found by running seven of them: nothing is believed for its name.

Two documents, of four and three tokens, go through the decoder once. Every *kind* of layer is then tried on its own
input, in float32, so that no rounding hides or feigns a difference:

    causal    another last token changes nothing before it
    packs     another first document changes nothing in the second
    sweeps    the layer in tiles of three tokens gives what it gives whole

Layers are of one kind when they have the same modules with the same plain settings. A layer that hands something on to
later ones in a mapping (keys and values that several layers share) is seen by what it does to the mapping.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from longfit.attention.backends import tile_forward
from longfit.attention.spec import AttentionSpec
from longfit.attention.tile import QueryTile
from longfit.compat.torch import holds_values
from longfit.compat.transformers import attention_of, set_checkpoint_function
from longfit.engine.hf_model import base_model, decoder, last_norm, output_head
from longfit.engine.model_state import preserve_state
from longfit.engine.offload.activations import ActivationOffload, DeviceActivations
from longfit.engine.sweep.layer import run_layer_without_grad
from longfit.engine.sweep.layer_call import LayerCall, layer_call
from longfit.engine.sweep.recompute_state import preserve_random_state
from longfit.engine.sweep.saved_attention import SavedAttentionBudget
from longfit.engine.sweep.saved_products import SavedProductsBudget
from longfit.engine.sweep.shared_sequence import SharedSequence
from longfit.engine.sweep.unread_product import UnreadProducts
from longfit.errors import ModelError

NUM_TOKENS, CUT, TILE = 7, 4, 3
"""Tokens of the probe, of its first document, and of a tile: tiles and documents begin at different tokens."""

HEAD_ROWS = 4096
"""Rows of the output matrix that are in float32 at once."""

SAME = 1e-5
"""Relative difference that two float32 runs of one layer may have: a few hundred additions in another order differ by
1e-7 to 1e-6; a token that is seen and should not be changes a layer's output by more than 1e-4."""

SAME_ROUNDED = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""The same for the whole decoder in its own dtype, where the rounding of a mixture's products depends on how many
tokens an expert is given; ``SAME`` in other dtypes."""


@dataclass(frozen=True)
class LayerNature:
    """What was found about a layer.

    Attributes:
        sweeps: None, or why the layer cannot be swept.
        packs: None, or why packed documents see each other in it.
        causal: None, or that tokens see later ones.
    """

    sweeps: str | None = None
    packs: str | None = None
    causal: str | None = None

    def and_also(self, other: "LayerNature") -> "LayerNature":
        """Both natures at once: the layer was run more than once, or a reason is known from elsewhere."""
        return LayerNature(self.sweeps or other.sweeps, self.packs or other.packs, self.causal or other.causal)


@dataclass(frozen=True)
class ModelNature:
    """What was found about a model.

    Attributes:
        layers: those that are run through the gradient-checkpointing function, in order.
        packs: None, or why packed documents see each other somewhere in the model.
        causal: None, or where tokens see later ones.
        head: None, or that the logits are not those of the output matrix as longfit reads it.
        ends_in_norm: whether the decoder's last hidden states are what its last norm returned.
    """

    layers: dict[nn.Module, LayerNature]
    packs: str | None = None
    causal: str | None = None
    head: str | None = None
    ends_in_norm: bool = False

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
    run = partial(_run, base, inner, device, probe, positions=takes and _has_values(inner))
    head_present = probe.present(base.get_output_embeddings())
    with (
        _checkpointing(base, inner, probe.checkpoint_function),
        preserve_random_state(device),
        _named(base),
        head_present,
    ):
        one = run()
        first, last = run(other=slice(0, CUT)), run(other=slice(NUM_TOKENS - 1, NUM_TOKENS))
        head = _why_not_head(base, one) if _has_values(inner) else None
    natures = probe.result()
    packs = None if takes else f"{type(inner).__name__} takes no position_ids, by which documents are told apart"
    packs = packs or _first(names, {layer: nature.packs for layer, nature in natures.items()})
    entered = probe.first_inputs
    if packs is None and len(entered) == 3 and not _same(entered[0], entered[1]):
        packs = f"{type(inner).__name__} mixes tokens before its first layer"
    if packs is None and not _same(one.hidden, first.hidden):
        packs = f"{type(inner).__name__} lets packed documents see each other outside of its layers"
    causal = _first(names, {layer: nature.causal for layer, nature in natures.items()})
    if causal is None and not _same(one.hidden, last.hidden, slice(0, NUM_TOKENS - 1)):
        causal = f"{type(inner).__name__} lets tokens see later ones"
    return ModelNature(natures, packs, causal, head, one.ends_in_norm)


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

    def checkpoint_function(self, function: Any, *args: Any) -> Any:
        if not isinstance(function, partial) or not function.args or not isinstance(function.args[0], nn.Module):
            return function(*args)
        call, hidden = layer_call(function, args)
        if len(self.first_inputs) < self.num_runs:
            self.first_inputs.append(hidden.detach().clone())
        with torch.no_grad(), self.present(call.layer):
            if self.num_runs == 1:
                self._try(call, hidden)
            return self._watched(call, hidden)

    def _try(self, call: LayerCall, hidden: Tensor) -> None:
        kind = _kind_of(call)
        if kind not in self.kinds:
            self.kinds[kind] = _nature(call, hidden)
        self.natures[call.layer] = self.natures.get(call.layer, LayerNature()).and_also(self.kinds[kind])

    def _watched(self, call: LayerCall, hidden: Tensor) -> Any:
        """Run the layer, and see what it does to the mappings that it is given."""
        given = {name: value for name, value in call.keywords.items() if isinstance(value, (MutableMapping, list))}
        before = {name: _content(value) for name, value in given.items()}
        counted = {} if _has_values(call.layer) or not _takes_keywords(call) else {"sweep": _Counter()}
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


# ------------------------------------------------------------------------------------------------ one kind of layer
def _nature(call: LayerCall, hidden: Tensor) -> LayerNature:
    """Try a layer on its own input."""
    copied = _in_float32(call)
    call, hidden = copied, hidden if copied is call else _float32(hidden)
    name = type(call.layer).__name__

    counted = {} if _has_values(call.layer) or not _takes_keywords(call) else {"sweep": _Counter()}

    def run(given: Tensor) -> Any:
        return call.function(call.layer, given, *call.args, **_apart(call.keywords), **counted)

    out = run(hidden)
    reason = _why_not_swept(call, hidden, out)
    if not _has_values(call.layer):
        return LayerNature(reason)
    whole = out[0] if isinstance(out, tuple) else out
    if not isinstance(whole, Tensor) or whole.shape[:2] != hidden.shape[:2]:
        return LayerNature(reason, f"{name} does not return the hidden states", None)
    first, last = (run(_other(hidden, tokens)) for tokens in (slice(0, CUT), slice(NUM_TOKENS - 1, NUM_TOKENS)))
    first, last = (x[0] if isinstance(x, tuple) else x for x in (first, last))
    packs = None if _same(whole, first) else f"{name} carries something from token to token across documents"
    causal = None if _same(whole, last, slice(0, NUM_TOKENS - 1)) else f"{name} lets tokens see later ones"
    return LayerNature(reason, packs, causal)


def _why_not_swept(call: LayerCall, hidden: Tensor, out: Any) -> str | None:
    name = type(call.layer).__name__
    if not _takes_keywords(call):
        return f"{name} does not pass keyword arguments on"
    counter = _Counter()
    try:
        call.function(call.layer, hidden, *call.args, **_apart(call.keywords), sweep=counter)
    except TypeError as error:
        if "'sweep'" not in str(error):
            raise
        return f"its attention does not take keyword arguments ({error})"
    if counter.num_calls != 1:
        return f"it attends {counter.num_calls} times through the attention interface, not once"
    if not isinstance(out, Tensor) or out.shape[:2] != hidden.shape[:2]:  # a model takes [0] of a tuple, even of one
        return "it does not return the hidden states alone"
    if not _has_values(call.layer):
        return None
    try:
        tiled = run_layer_without_grad(hidden, replace(call, keywords=_apart(call.keywords)), _ProbeSweep())
    except (ModelError, RuntimeError, ValueError, IndexError) as error:
        return f"{name} does not run on a tile of tokens ({str(error).splitlines()[0]})"
    if not _same(tiled, out, slice(None)):
        return f"{name} carries a state from token to token besides attention"
    return None


def _takes_keywords(call: LayerCall) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(call.function).parameters.values())


class _Counter:
    """Stands in for a tile: attends plainly and counts."""

    def __init__(self) -> None:
        self.num_calls = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        self.num_calls += 1
        batch, num_heads, num_tokens, _ = query.shape
        plain = AttentionSpec(scaling=spec.scaling, softcap=spec.softcap)
        schedule = plain.schedule(batch, num_heads, num_tokens, query.device)
        tile = QueryTile(query, key, value, schedule, 0, spec.scaling, spec.softcap)
        return tile_forward(tile)[0].transpose(1, 2)


class _ProbeSweep:
    """A sweep in tiles of three tokens that keeps nothing."""

    def __init__(self) -> None:
        self.offload: ActivationOffload = DeviceActivations()
        self.sequence: SharedSequence | None = None
        self.saved_attention = SavedAttentionBudget(0)
        self.saved_products = SavedProductsBudget(0)
        self.unread = UnreadProducts()

    def tile_for(self, hidden: Tensor) -> int:
        return TILE

    def present(self, module: nn.Module, *, backward: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    def layer_differentiated(self, device: torch.device) -> None:
        return


def _kind_of(call: LayerCall) -> Any:
    """The modules of a layer with their plain settings and parameter shapes, and what it is called with."""
    modules = []
    for name, module in call.layer.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if key not in _NUMBERS and isinstance(value, (bool, int, float, str, type(None)))
        }
        replaced = vars(module).get("forward")  # somebody's patch of this one module
        settings["forward"] = str(id(getattr(replaced, "__func__", replaced)))
        shapes = tuple((key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False))
        modules.append((name, type(module), tuple(sorted(settings.items(), key=lambda item: item[0])), shapes))
    given = tuple(sorted((name, type(value)) for name, value in call.keywords.items()))
    return tuple(modules), repr(given), len(call.args)


_NUMBERS = ("layer_idx", "layer_id", "layer_number", "idx", "training", "gradient_checkpointing")
"""Settings that tell layers of one kind apart."""


def _in_float32(call: LayerCall) -> LayerCall:
    """The call with a copy of the layer in float32; the layer itself where it computes in float32 or float64."""
    dtypes = {p.dtype for p in call.layer.parameters() if p.is_floating_point()}
    if dtypes & {torch.bfloat16, torch.float16} and _has_values(call.layer):
        args, keywords = _float32(call.args), _float32(call.keywords)
        return replace(call, layer=_layer_in_float32(call.layer), args=args, keywords=keywords)
    return call


def _layer_in_float32(layer: nn.Module) -> nn.Module:
    """A copy of a layer alone: ``deepcopy`` follows a method to what it is bound to, which may be the whole model, and
    copies the storage of packed weights whole, of which they may be slices; both are shared.
    """
    copied: dict[int, Any] = {}
    for module in layer.modules():
        copied |= {id(value): value for value in vars(module).values() if inspect.ismethod(value)}
    for tensor in [*layer.parameters(), *layer.buffers()]:
        narrow = tensor.dtype in (torch.bfloat16, torch.float16)
        copied[id(tensor)] = type(tensor)(tensor.detach().float()) if narrow else tensor
    return copy.deepcopy(layer, copied)


def _float32(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _float32(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(_float32, value))
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def _apart(keywords: dict[str, Any]) -> dict[str, Any]:
    """Mappings and lists copied, so that a trial leaves nothing in them."""
    return {
        name: copy.copy(value) if isinstance(value, (MutableMapping, list)) else value
        for name, value in keywords.items()
    }


def _other(hidden: Tensor, tokens: slice) -> Tensor:
    """The hidden states with other ones in the place of some tokens."""
    draw = torch.Generator().manual_seed(0)
    other = hidden.clone()
    noise = torch.randn(other[:, tokens].shape, generator=draw).to(other)
    other[:, tokens] += noise * other.square().mean().sqrt()
    return other


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


def _same(one: Tensor, other: Tensor, tokens: slice = slice(CUT, None)) -> bool:
    """Whether two results agree on some tokens."""
    if not holds_values(one):
        return True
    allowed = SAME_ROUNDED.get(one.dtype, SAME)
    one, other = one[:, tokens].double(), other[:, tokens].double()
    return bool((one - other).norm() <= allowed * one.norm())


def _has_values(module: nn.Module) -> bool:
    """Whether the weights are there, or only their shapes, as where memory is counted."""
    return all(map(holds_values, module.parameters()))


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
