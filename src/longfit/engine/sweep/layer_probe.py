"""One kind of layer, tried on its own input of seven tokens: causal, packs, sweeps; see ``probe.py``."""

import copy
import inspect
from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longfit.attention.backends import tile_forward
from longfit.attention.spec import AttentionSpec
from longfit.attention.tile import QueryTile
from longfit.attention.visibility import keeps_own_structure
from longfit.compat.torch import holds_values
from longfit.engine.offload.activations import ActivationOffload, DeviceActivations
from longfit.engine.sweep.layer import run_layer, run_layer_without_grad
from longfit.engine.sweep.layer_call import LayerCall, cut_tokens
from longfit.engine.sweep.recurrent_state import Carrying, TileState
from longfit.engine.sweep.saved_attention import SavedAttentionBudget
from longfit.engine.sweep.saved_products import SavedProductsBudget
from longfit.engine.sweep.shared_sequence import SharedSequence
from longfit.engine.sweep.unread_product import UnreadProducts
from longfit.errors import ModelError

NUM_TOKENS, CUT, TILE = 7, 4, 3
"""Tokens of the probe, of its first document, and of a tile: tiles and documents begin at different tokens."""

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
        attends: what it asks of the attention interface, in words; "" where it does not use that.
        carrying: how a state is carried from tile to tile while it is swept; None for a layer that carries none.
        packs_swept: ``packs`` while it is swept.
        returns_beside: how many None it returns in a tuple behind the hidden states; None for those alone.
    """

    sweeps: str | None = None
    packs: str | None = None
    causal: str | None = None
    attends: str = ""
    carrying: Carrying | None = None
    packs_swept: str | None = None
    returns_beside: int | None = None

    def and_also(self, other: "LayerNature") -> "LayerNature":
        """Both natures at once: the layer was run more than once, or a reason is known from elsewhere."""
        return LayerNature(
            self.sweeps or other.sweeps,
            self.packs or other.packs,
            self.causal or other.causal,
            self.attends or other.attends,
            self.carrying or other.carrying,
            self.packs_swept or other.packs_swept,
            self.returns_beside if self.returns_beside is not None else other.returns_beside,
        )


def layer_nature(call: LayerCall, hidden: Tensor) -> LayerNature:
    """Try a layer on its own input."""
    copied = _in_float32(call)
    call, hidden = copied, hidden if copied is call else _float32(hidden)
    name = type(call.layer).__name__

    counted = {} if has_values(call.layer) or not takes_keywords(call) else {"sweep": PlainAttention()}

    def run(given: Tensor) -> Any:
        return call.function(call.layer, given, *call.args, **_apart(call.keywords), **counted)

    out = run(hidden)
    counter = PlainAttention()
    reason = _why_not_called(call, hidden, counter)
    whole, beside = (out, 0) if not isinstance(out, tuple) else (out[0], len(out) - 1)
    if not isinstance(whole, Tensor) or whole.shape[:2] != hidden.shape[:2]:
        wrong = f"{name} does not return the hidden states"
        return LayerNature(reason or wrong, wrong, None, counter.asked, packs_swept=wrong)
    if reason is None and isinstance(out, tuple) and any(part is not None for part in out[1:]):
        reason = "it does not return the hidden states alone"
    carrying: Carrying | None = None
    if reason is None:
        carrying, reason = _why_not_swept(call, hidden, whole, counter)
    returns = beside if isinstance(out, tuple) else None
    if not has_values(call.layer):
        return LayerNature(reason, attends=counter.asked, carrying=carrying, returns_beside=returns)
    first, last = (run(_other(hidden, tokens)) for tokens in (slice(0, CUT), slice(NUM_TOKENS - 1, NUM_TOKENS)))
    first, last = (x[0] if isinstance(x, tuple) else x for x in (first, last))
    packs = None if same(whole, first) else f"{name} carries something from token to token across documents"
    causal = None if same(whole, last, slice(0, NUM_TOKENS - 1)) else f"{name} lets tokens see later ones"
    packs_swept = packs
    if packs is not None and carrying is not None and packs_while_swept(replace(call, carrying=carrying), hidden):
        packs_swept = None
    return LayerNature(reason, packs, causal, counter.asked, carrying, packs_swept, returns)


def _why_not_called(call: LayerCall, hidden: Tensor, counter: "PlainAttention") -> str | None:
    """Call a layer as a sweep does, and count how often it attends."""
    if not takes_keywords(call):
        return f"{type(call.layer).__name__} does not pass keyword arguments on"
    try:
        call.function(call.layer, hidden, *call.args, **_apart(call.keywords), sweep=counter)
    except TypeError as error:
        if "'sweep'" not in str(error):
            raise
        return f"its attention does not take keyword arguments ({error})"
    if counter.num_calls > 1:
        return f"it attends {counter.num_calls} times through the attention interface, not once"
    return None


def _why_not_swept(
    call: LayerCall, hidden: Tensor, whole: Tensor, counter: "PlainAttention"
) -> tuple[Carrying | None, str | None]:
    """Run a layer in tiles, with a state where it needs one; how it carries that, or why it cannot be swept."""
    attends = counter.num_calls == 1
    reason = None
    if attends:
        if not has_values(call.layer):
            return None, None
        reason = _why_not_tiled(call, hidden, whole)
        if reason is None:
            return None, None
    carrying = _carrying(call, hidden, attends=attends)
    if carrying is None:
        return None, reason or "it attends 0 times through the attention interface, not once"
    if not has_values(call.layer):
        return carrying, None
    call = _one_document(replace(call, carrying=carrying))
    wrong = _why_not_tiled(call, hidden, whole) or _why_not_differentiated(call, hidden)
    return (carrying, None) if wrong is None else (None, wrong)


def _one_document(call: LayerCall) -> LayerCall:
    """The call with positions that begin no second document: the layer whole does not heed them, its tiles would."""
    positions = call.position_ids
    if positions is None or positions.shape[-1] != NUM_TOKENS:
        return call
    one = torch.arange(NUM_TOKENS, device=positions.device).expand_as(positions)
    return replace(call, keywords=call.keywords | {"position_ids": one})


def _carrying(call: LayerCall, hidden: Tensor, *, attends: bool) -> Carrying | None:
    """Find how a layer carries a state; None if it can use no cache that is differentiated, or attends by itself."""
    argument, state, mask = call.cache_argument, TileState({}, NUM_TOKENS), call.keywords.get("attention_mask")
    if argument is None or (not attends and isinstance(mask, Tensor) and mask.dim() > 2):
        return None
    try:
        keywords = _apart(call.keywords) | {argument: state}
        call.function(call.layer, hidden, *call.args, **keywords, sweep=PlainAttention())
    except _CANNOT:
        return None
    if state.has_keys and not attends:  # by another attention than that of the interface
        return None
    return Carrying(argument, attends, in_words(state))


_CANNOT = (ModelError, AttributeError, TypeError, RuntimeError, ValueError, IndexError, KeyError)
"""What a layer raises that cannot use a cache of the sweep's, or a tile of tokens."""


def _why_not_tiled(call: LayerCall, hidden: Tensor, whole: Tensor) -> str | None:
    name = type(call.layer).__name__
    try:
        tiled = run_layer_without_grad(hidden, replace(call, keywords=_apart(call.keywords)), _ProbeSweep())
    except _CANNOT as error:
        return f"{name} does not run on a tile of tokens ({(str(error).splitlines() or [type(error).__name__])[0]})"
    if not same(tiled, whole, slice(None)):
        beside = " besides attention" if call.attends else ""
        how = "" if call.carrying is None else ", which its cache does not carry from tile to tile"
        return f"{name} carries a state from token to token{beside}{how}"
    return None


def _why_not_differentiated(call: LayerCall, hidden: Tensor) -> str | None:
    """Compare the gradient of a layer in tiles, through the states it carries, with that of the layer whole."""
    found = []
    for tiled in (False, True):
        with torch.enable_grad():
            given = hidden.detach().clone().requires_grad_()
            keywords = _apart(call.keywords)
            if tiled:
                out: Any = run_layer(given, replace(call, keywords=keywords), _ProbeSweep(), parameters=())
            else:
                out = call.function(call.layer, given, *call.args, **keywords)
            out = out[0] if isinstance(out, tuple) else out
            try:
                found.append(torch.autograd.grad(out, given, _other(torch.zeros_like(out) + 1, slice(None)))[0])
            except RuntimeError as error:
                return f"{type(call.layer).__name__} is not differentiated in tiles ({str(error).splitlines()[0]})"
    if same(found[0], found[1], slice(None)):
        return None
    return f"{type(call.layer).__name__} carries a state from token to token through which no gradient flows"


def packs_while_swept(call: LayerCall, hidden: Tensor) -> bool:
    """Whether the second of two documents is, in tiles, what it is alone, whatever the first one is."""
    if call.attends:
        return False
    both, other = (run_layer_without_grad(x, call, _ProbeSweep()) for x in (hidden, _other(hidden, slice(0, CUT))))
    args, keywords = cut_tokens((call.args, call.keywords), start=CUT, end=NUM_TOKENS, num_tokens=NUM_TOKENS)
    alone = call.function(call.layer, hidden[:, CUT:], *args, **keywords)
    alone = alone[0] if isinstance(alone, tuple) else alone
    return same(both, other) and same(both[:, CUT:], alone, slice(None))


def run_as_swept(nature: LayerNature, call: LayerCall, hidden: Tensor) -> Any:
    """Run a layer as a sweep will; plainly if it will not be swept."""
    if nature.sweeps is not None:
        return call.function(call.layer, hidden, *call.args, **call.keywords)
    out = run_layer_without_grad(hidden, replace(call, carrying=nature.carrying), _ProbeSweep())
    return out if nature.returns_beside is None else (out, *[None] * nature.returns_beside)


def in_words(state: TileState) -> str:
    """What a layer carries."""
    words = []
    for (kind, _, _), tensor in state.outgoing.items():
        if kind == "conv":
            words.append(f"the last {tensor.shape[-1]} inputs of a convolution")
        else:
            words.append(f"a state of {tensor[0].numel():,} numbers")
    return " and ".join(words) or "nothing"


def takes_keywords(call: LayerCall) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(call.function).parameters.values())


class PlainAttention:
    """Stands in for a tile: attends plainly and counts."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.asked = ""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        self.num_calls += 1
        self.asked = _in_words(query, key, value, spec)
        batch, num_heads, num_tokens, _ = query.shape
        plain = AttentionSpec(scaling=spec.scaling, softcap=spec.softcap)
        schedule = plain.schedule(batch, num_heads, num_tokens, query.device)
        tile = QueryTile(query, key, value, schedule, 0, spec.scaling, spec.softcap)
        return tile_forward(tile)[0].transpose(1, 2)


def _in_words(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> str:
    """What a layer asks of its attention."""
    words = [f"{query.shape[1]} query heads on {key.shape[1]} of {key.shape[-1]} numbers"]
    if value.shape[-1] != key.shape[-1]:
        words.append(f"values of {value.shape[-1]}")
    if spec.sliding_window is not None:
        words.append(f"a window of {spec.sliding_window:,}")
    elif keeps_own_structure(spec.attention_mask):
        words.append("chunks or a window that its mask tells")
    if spec.sinks is not None:
        words.append("sinks")
    if spec.softcap is not None:
        words.append(f"scores capped at {spec.softcap:g}")
    return ", ".join(words)


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


def kind_of(call: LayerCall) -> Any:
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
    if dtypes & {torch.bfloat16, torch.float16} and has_values(call.layer):
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


def same(one: Tensor, other: Tensor, tokens: slice = slice(CUT, None)) -> bool:
    """Whether two results agree on some tokens."""
    if not holds_values(one):
        return True
    allowed = SAME_ROUNDED.get(one.dtype, SAME)
    one, other = one[:, tokens].double(), other[:, tokens].double()
    return bool((one - other).norm() <= allowed * one.norm())


def has_values(module: nn.Module) -> bool:
    """Whether the weights are there, or only their shapes, as where memory is counted."""
    return all(map(holds_values, module.parameters()))
