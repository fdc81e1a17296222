"""Extend a loaded model to a longer context: rotary positions, limits, attention (LongLoRA, sections 3.2 and 4.1).

The formulas are in ``numerics/rope.py``; here they become settings of the model's own configuration, so that a saved
model reloads as it was trained, in plain transformers. The change lives in the *base* configuration: an adapter file
does not carry it. What a configuration cannot say exactly is refused, not approximated: interpolating a model that was
extended by another method would give rotary tables that no training has seen.

Editing the configuration of a loaded model changes nothing by itself: the rotary modules are rebuilt from it, in
float32. Casting a whole model to bfloat16 ruins them (at position 32,768 angles are off by many radians); this repairs.
"""

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from longfit.attention.hf_attention import attention_key
from longfit.attention.limits import quarter_of
from longfit.compat.transformers import attention_of
from longfit.engine.hf_model import base_model
from longfit.errors import ContextError, ModelError
from longfit.files.reading import reading
from longfit.numerics import rope as formulas
from longfit.numerics.shifted_attention import receptive_field

ROPES = ("yarn", "linear", "ntk", "theta", "none")

_EXTENDABLE = {
    "yarn": ("default", "dynamic", "yarn"),
    "linear": ("default", "dynamic", "linear"),
    "ntk": ("default", "dynamic", "linear", "llama3"),
    "theta": ("default", "dynamic", "linear", "llama3"),
}
"""Which present ``rope_type`` each method extends exactly. "dynamic" changes nothing up to the maximum it was loaded
with; "ntk" and "theta" only raise theta, below whatever static scaling there is."""


_REPORT = "_longfit_context"
"""Attribute of a transformers model that holds its report."""


@dataclass(frozen=True)
class ContextReport:
    """What ``extend_context`` changed.

    Attributes:
        context: tokens the model now takes.
        native_context: tokens the base was made for, before any extension that its configuration records.
        factor: context divided by native context, exact; 1.0 when positions did not change.
        rope: the method; ``"none"`` when positions did not change.
        rope_before, rope_after: the ``rope_parameters`` that changed (of the full-attention layers where they differ).
        attention: the key that transformers knows the attention by.
        group_size: tokens per group of shifted attention; None when exact.
        reach: tokens that all layers together carry information across with shifted attention; None when exact.
        changes: one line for each thing changed.
        warnings: what the user should know before training.
    """

    context: int
    native_context: int
    factor: float
    rope: str
    rope_before: dict[str, Any]
    rope_after: dict[str, Any]
    attention: str
    group_size: int | None
    reach: int | None
    changes: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """Say each change, and each warning, in a line."""
        return "\n".join([f"context {self.context:,} tokens", *self.changes, *(f"warning: {w}" for w in self.warnings)])


def extend_context(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    context: int,
    rope: str = "yarn",
    attention: str = "exact",
    group_size: int | None = None,
    theta: float | None = None,
) -> ContextReport:
    """Make a model take ``context`` tokens, in place (LongLoRA, sections 3.2 and 4.1).

    Positions change only when ``context`` exceeds what the model takes now. Extending an extended model by the same
    method equals extending the original once.

    Args:
        model: a transformers causal language model with rotary positions, or a PeftModel around one.
        tokenizer: its ``model_max_length`` is raised too; None is no tokenizer.
        context: tokens to train and evaluate at.
        rope: ``"yarn"`` (holds without training), ``"linear"`` (the paper's position interpolation), ``"ntk"``,
            ``"theta"``, or ``"none"``: only the limits are raised.
        attention: ``"exact"``, or ``"shifted"`` while training.
        group_size: tokens per group of shifted attention; by default a quarter of the context, made even.
        theta: for ``rope="theta"``, the new theta itself; by default ``numerics.rope.context_theta``.
    Returns: what was changed; ``longfit.reports(model).context`` from now on.
    Raises: ContextError: settings that do not go together, or a method that cannot extend the present positions.
        ModelError: the model has no rotary positions, or its attention cannot be set.
    """
    base = base_model(model)
    config = base.config.get_text_config()
    group_size = _group_size(context, attention, group_size)
    layers = _num_shifted_layers(config)
    if attention == "shifted" and not layers:
        raise ContextError(
            "attention 'shifted': every layer of this model has a sliding window, which it keeps; use attention 'exact'"
        )
    before = _rope_parameters(config)
    present, native = _contexts(before, int(config.max_position_embeddings))
    if rope not in ROPES:
        raise ContextError(f"rope {rope!r}: unknown; allowed are {', '.join(ROPES)}")
    if theta is not None and rope != "theta":
        raise ContextError(f"theta {theta}: only rope 'theta' takes one, not {rope!r}; drop it or use rope 'theta'")
    rope = rope if context > present else "none"
    after = dict(before)
    if rope != "none":
        after = _extended(before, config, rope, context=context, present=present, native=native, theta=theta)
        _check_accepted(config, after, context=context, rope=rope)
    rotaries = list(_rotary_modules(base))  # nothing is changed before all has been checked
    key = attention_key(attention, group_size)

    changes = _apply_positions(config, rotaries, after, context=max(context, present), changed=after != before)
    changes += _apply_limits(base, tokenizer, context=context, present=present)
    changes += _apply_attention(base, key)
    reach = None if group_size is None else receptive_field(layers, group_size)
    report = ContextReport(
        context=context,
        native_context=native,
        factor=context / native if rope != "none" else 1.0,
        rope=rope,
        rope_before=before,
        rope_after=after,
        attention=key,
        group_size=group_size,
        reach=reach,
        changes=tuple(changes),
        warnings=tuple(_warnings(context, present, rope, group_size, reach)),
    )
    vars(base)[_REPORT] = report
    return report


def context_report(base: Any) -> ContextReport | None:
    """What ``extend_context`` changed last in a transformers model; None if it was not called."""
    report: ContextReport | None = vars(base).get(_REPORT)
    return report


def adopt_positions(model: nn.Module, folder: str | os.PathLike[str]) -> bool:
    """Give a model the positions of a saved configuration, in place: those that an adapter in that folder trained at.

    Returns: whether they differed.
    Raises: ModelError: the model has no rotary positions.
    """
    config = base_model(model).config.get_text_config()
    with reading(folder, "the configuration of the adapter", ModelError, do="copy it again"):
        saved = AutoConfig.from_pretrained(str(folder), trust_remote_code=False).get_text_config()
    keys = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings")
    wanted = {key: saved.to_dict().get(key) for key in keys}
    if all(config.to_dict().get(key) == value for key, value in wanted.items()):
        return False
    rotaries = list(_rotary_modules(base_model(model)))
    for key, value in wanted.items():
        if value is not None:
            setattr(config, key, copy.deepcopy(value))
    for parent, name, rotary in rotaries:
        parent.add_module(name, type(rotary)(config=config).to(_inverse_frequencies(rotary)[0].device))
    return True


def _group_size(context: int, attention: str, group_size: int | None) -> int | None:
    if context < 1:
        raise ContextError(f"context {context}: must be at least 1 token")
    if attention == "shifted" and group_size is None:
        return quarter_of(context)
    return group_size


def _num_shifted_layers(config: Any) -> int:
    """Layers without a sliding window of their own."""
    settings = config.to_dict()
    layer_types = settings.get("layer_types")
    if layer_types is not None:
        return sum(layer_type == "full_attention" for layer_type in layer_types)
    return 0 if settings.get("sliding_window") is not None else config.num_hidden_layers


def _rope_parameters(config: Any) -> dict[str, Any]:
    """A copy of the parameters that an extension changes: all, or those of the full-attention layers."""
    parameters = config.to_dict().get("rope_parameters")
    if not parameters:
        raise ModelError(
            f"{config.model_type}: has no rotary positions (rope_parameters) to extend; use a model that has them"
        )
    if not _is_nested(parameters):
        return dict(parameters)
    if not parameters.get("full_attention"):
        raise ModelError(
            f"{config.model_type}: rope_parameters are given for {', '.join(parameters)}; longfit extends those of"
            " 'full_attention', which this model lacks"
        )
    return dict(parameters["full_attention"])


def _is_nested(parameters: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in parameters.values())


def _contexts(parameters: dict[str, Any], maximum: int) -> tuple[int, int]:
    """Tokens that the model takes at present, and before any extension it records; a raised theta leaves no record."""
    if parameters["rope_type"] == "yarn":
        native = int(parameters["original_max_position_embeddings"])
        return max(maximum, int(native * parameters["factor"])), native  # some files never raised the maximum
    if parameters["rope_type"] == "linear":
        return maximum, max(1, round(maximum / parameters["factor"]))
    return maximum, maximum


def _extended(
    before: dict[str, Any],
    config: Any,
    rope: str,
    *,
    context: int,
    present: int,
    native: int,
    theta: float | None,
) -> dict[str, Any]:
    """Merge one method into present parameters; what it does not concern (theta, partial rotation) stays."""
    rope_type = before["rope_type"]
    if rope_type not in _EXTENDABLE[rope]:
        methods = [repr(method) for method, types in _EXTENDABLE.items() if rope_type in types]
        raise ContextError(
            f"rope {rope!r}: this model's positions are scaled by {rope_type!r} up to {present:,} tokens; the two"
            f" do not compose; {_try(methods)}, or keep the context at {present:,} or below"
        )
    after = dict(before)
    if rope_type == "dynamic":
        after = {name: value for name, value in before.items() if name != "factor"}
        after["rope_type"] = "default"
    if rope == "yarn":
        after.pop("attention_factor", None)  # it belonged to the former factor
        return {
            **after,
            "rope_type": "yarn",
            "factor": context / native,
            "original_max_position_embeddings": native,
        }
    if rope == "linear":
        return {**after, "rope_type": "linear", "factor": after.get("factor", 1.0) * context / present}
    old = float(before["rope_theta"])
    if rope == "ntk":
        return {**after, "rope_theta": formulas.ntk_theta(_rotated(config, before), old, factor=context / present)}
    if theta is None:
        return {**after, "rope_theta": formulas.context_theta(old, native_context=present, context=context)}
    if theta <= old:
        raise ContextError(f"theta {theta}: must be above the model's {old}, or its context would shrink")
    return {**after, "rope_theta": float(theta)}


def _try(methods: list[str]) -> str:
    return f"try rope {' or '.join(methods)}" if methods else "longfit cannot extend it"


def _check_accepted(config: Any, after: dict[str, Any], *, context: int, rope: str) -> None:
    """Ask the family's own validation, before anything is changed: Phi-3, for one, would not save YaRN."""
    trial = copy.deepcopy(config)
    _write_positions(trial, after, context=context)
    try:
        trial.validate_rope()
    except ValueError as error:
        raise ContextError(
            f"rope {rope!r}: the configuration of {config.model_type} does not accept it ({error}); try rope 'ntk' or"
            " 'theta', which only raise its theta"
        ) from error


def _write_positions(config: Any, after: dict[str, Any], *, context: int) -> None:
    parameters = config.rope_parameters
    config.rope_parameters = {**parameters, "full_attention": after} if _is_nested(parameters) else after
    original = after.get("original_max_position_embeddings")
    if original is not None and config.to_dict().get("original_max_position_embeddings") is not None:
        config.original_max_position_embeddings = original  # a second copy, which would win
    config.max_position_embeddings = context


def _rotated(config: Any, parameters: dict[str, Any]) -> int:
    """Dimensions of a head that rotate."""
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def _rotary_modules(base: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name in it, module) of every rotary embedding: modules that own an inverse-frequency buffer."""
    found = False
    for parent in base.modules():
        for name, child in parent.named_children():
            if any(buffer.endswith("inv_freq") for buffer, _ in child.named_buffers(recurse=False)):
                found = True
                yield parent, name, child
    if not found:
        raise ModelError(
            f"{type(base).__name__}: has no rotary embedding module that could be rebuilt; use a model that computes"
            " its positions in one module, as Llama does"
        )


def _inverse_frequencies(rotary: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in rotary.named_buffers(recurse=False) if name.endswith("inv_freq")]


def _apply_positions(
    config: Any,
    rotaries: list[tuple[nn.Module, str, nn.Module]],
    after: dict[str, Any],
    *,
    context: int,
    changed: bool,
) -> list[str]:
    """Write the configuration, then rebuild the rotary modules from it where it, or their precision, is off."""
    changes = []
    present = config.max_position_embeddings
    _write_positions(config, after, context=context)
    if changed:
        changes.append(f"config.rope_parameters -> {after}")
    if context != present:
        changes.append(f"config.max_position_embeddings {present:,} -> {context:,}")
    for parent, name, rotary in rotaries:
        tables = _inverse_frequencies(rotary)
        if changed or any(table.dtype != torch.float32 for table in tables):
            parent.add_module(name, type(rotary)(config=config).to(tables[0].device))
            changes.append(f"{type(rotary).__name__} rebuilt, float32")
    return changes


def _apply_limits(base: Any, tokenizer: Any, *, context: int, present: int) -> list[str]:
    changes = []
    if tokenizer is not None and tokenizer.model_max_length < context:
        changes.append(f"tokenizer.model_max_length {tokenizer.model_max_length:,} -> {context:,}")
        tokenizer.model_max_length = context
    generation = base.generation_config
    if generation is not None and generation.max_length == present < context:
        changes.append(f"generation_config.max_length {present:,} -> {context:,}")
        generation.max_length = context
    return changes


def _apply_attention(base: Any, key: str) -> list[str]:
    before = attention_of(base)
    base.set_attn_implementation(key)
    if attention_of(base) != key:
        raise ModelError(
            f"{type(base).__name__}: takes no attention from transformers' AttentionInterface; use a model"
            " that does, as Llama, Qwen, Mistral, Gemma and Phi do"
        )
    return [f"attention {before} -> {key}"] if before != key else []


def _warnings(context: int, present: int, rope: str, group_size: int | None, reach: int | None) -> Iterator[str]:
    if rope == "none" and context > present:
        yield (
            f"context {context:,} is beyond the {present:,} tokens of the model and its positions are not scaled:"
            " expect perplexity to explode there; use rope 'yarn'"
        )
    if reach is not None and reach < context:
        yield (
            f"shifted attention with group_size {group_size:,} carries information across at most {reach:,} tokens,"
            f" less than the context of {context:,}: nothing farther apart is learned together; raise the group size"
        )
