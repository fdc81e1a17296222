"""The attention that transformers calls for every layer: exact, or shifted while a module trains.

    attention_key    registers one of them with transformers under a name and returns the name
    attend           what is registered: one layer's attention, or a tile's of it under the layer sweep

Shifted attention (LongLoRA, section 3.2) acts only while a module trains; evaluation and generation are exact. The
computation is ``backends``'; here is what a layer asks for, turned into a schedule, and what is refused.
"""

import warnings
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longfit.attention.backends import sinks_grad, tile_backward, tile_forward
from longfit.attention.mask_reading import read_mask, unreadable
from longfit.attention.spec import AttentionSpec
from longfit.attention.tile import QueryTile
from longfit.attention.visibility import Schedule, check_group_size, keeps_own_structure
from longfit.compat.torch import autocast_dtype, holds_values
from longfit.errors import ContextError, ModelError


class TileContext(Protocol):
    """What the layer sweep passes down as ``sweep=``: it attends for its tile and keeps K, V, their gradients."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        """Attend from a tile's q ``[B, H, t, D]``, k and v ``[B, K, t, D]``; returns ``[B, t, H, D]``."""
        ...


def attention_key(attention: str = "exact", group_size: int | None = None) -> str:
    """Register an attention with transformers, once per process, and name it.

    ``model.set_attn_implementation(attention_key("shifted", 4096))`` uses it; saved configs do not carry it.

    Args:
        attention: ``"exact"`` or ``"shifted"``; shifted acts while a module trains and is exact otherwise.
        group_size: tokens per group of shifted attention; even.
    Returns: ``"longfit-exact"`` or ``"longfit-shifted-<group_size>"``.
    Raises: ContextError: the two do not go together, or ``group_size`` is odd or below 2.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if attention not in ("exact", "shifted"):
        raise ContextError(f"attention {attention!r}: unknown; allowed are 'exact' and 'shifted'")
    if attention == "exact" and group_size is not None:
        raise ContextError(f"group_size {group_size}: exact attention has no groups; drop it or say 'shifted'")
    if attention == "shifted":
        if group_size is None:
            raise ContextError("group_size: shifted attention needs an even number; try a quarter of the context")
        check_group_size(group_size)
    key = "longfit-exact" if group_size is None else f"longfit-shifted-{group_size}"
    AttentionInterface.register(key, partial(attend, group_size=group_size))
    AttentionMaskInterface.register(key, visible_keys)
    return key


def visible_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    *,
    local_size: int | None = None,
    config: Any = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Read what the family's mask shows, and build none; a key without a mask function loses padding in silence.

    Args: those of transformers' mask functions.
    Returns: int32 ``[B, 1, keys that hold tokens, 2]`` of ``read_mask``, or None when all see everything before them;
        shorter than the keys of a static cache.
    """
    from transformers.masking_utils import causal_mask_function

    mask_function = mask_function or causal_mask_function
    held = int(q_offset) - kv_offset + q_length
    padding = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + held]
    if padding is not None and bool(padding.all()):
        padding = None
    if mask_function is causal_mask_function and padding is None and held == kv_length:
        return None
    if not holds_values(torch.empty(0, device=device)):  # only shapes are computed, as where memory is counted
        return None
    text = None if config is None else config.get_text_config(decoder=True)
    return read_mask(
        mask_function,
        batch_size=batch_size,
        num_queries=q_length,
        num_keys=held,
        key_offset=kv_offset,
        padding=padding,
        num_heads=getattr(text, "num_attention_heads", None) or 1,
        own_structure=local_size is not None,
        device=device,
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    group_size: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    s_aux: Tensor | None = None,
    sweep: TileContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend for one layer: the function registered with transformers.

    Packed documents are told apart by ``position_ids`` or ``cu_seq_lens_q``; with a key/value cache that already holds
    tokens, attention is exact and aligned to the last query.

    Args:
        module: the attention layer; shifted attention acts when it is in training mode.
        query: ``[B, H, t, D]``.
        key, value: ``[B, K, n, D]``, not repeated, ``n >= t``.
        attention_mask: ``[B, 1, n, 2]`` from ``visible_keys``, or ``[B, n]``, 0 for padding; None: every earlier token.
        group_size: of shifted attention; None is exact.
        s_aux: the layer's sinks, H numbers: one more logit a head in the softmax (gpt-oss).
        sweep: the tile that the layer sweep is at; it attends instead.
        kwargs: what else a model passes; refused where it would change the result.
    Returns: ``[B, t, H, D]`` and None (attention weights never exist).
    Raises: ModelError: the layer asks for what this attention does not do. DataError: the padding mask has holes.
    """
    _refuse(module, attention_mask, is_causal, kwargs)
    if dropout:
        warnings.warn(
            f"attention dropout {dropout} of {type(module).__name__} is trained with 0: its pattern cannot be repeated"
            " tile by tile; the adapters' own dropout regularises instead",
            stacklevel=2,
        )
    query, key, value = _same_dtype(query, key, value)
    spec = AttentionSpec(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        group_size=group_size if module.training and not keeps_own_structure(attention_mask) else None,
        sliding_window=sliding_window,
        position_ids=position_ids,
        attention_mask=attention_mask,
        cu_seqlens=cu_seq_lens_q,
        sinks=None if s_aux is None else s_aux.reshape(-1),
    )
    if sweep is not None:
        return sweep.attend(query, key, value, spec), None
    if attention_mask is not None:
        held = attention_mask.shape[1 if attention_mask.dim() == 2 else 2]
        key, value = key[:, :, :held], value[:, :, :held]  # a static cache has room for more
    batch, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    if num_keys > num_queries:  # a key/value cache holds earlier tokens
        if spec.group_size is not None:
            raise ModelError(
                f"{num_queries} queries on {num_keys} keys in training mode: shifted attention trains whole sequences;"
                " call model.eval() before generating, and train with use_cache=False"
            )
        spec = spec.one_document()
    schedule = spec.schedule(batch, num_heads, num_keys, query.device)
    return _Attention.apply(query, key, value, schedule, num_keys - num_queries, spec, spec.sinks).transpose(1, 2), None


class _Attention(torch.autograd.Function):
    """All queries as one tile; keeps q, k, v, out and one number per query and head."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        schedule: Schedule,
        start: int,
        spec: AttentionSpec,
        sinks: Tensor | None,
    ) -> Tensor:
        out, lse = tile_forward(QueryTile(q, k, v, schedule, start, spec.scaling, spec.softcap, sinks))
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.rest = (schedule, start, spec.scaling, spec.softcap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        grad_k, grad_v = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
        grad_q = tile_backward(QueryTile(q, k, v, *ctx.rest), grad_out, out, lse, grad_k=grad_k, grad_v=grad_v)
        grad_sinks = sinks_grad(grad_out, out, lse, sinks).to(sinks.dtype) if ctx.needs_input_grad[6] else None
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, grad_sinks


def _refuse(module: nn.Module, attention_mask: Tensor | None, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ModelError(f"{name}: attends in both directions; longfit's attention is causal; use attention 'sdpa'")
    if attention_mask is not None and unreadable(attention_mask):
        raise ModelError(
            f"{name}: this model's mask is none that longfit's attention computes: it shows a token something else than"
            " one range of keys that ends at itself; use attention 'eager' or 'sdpa' (engine=plain)"
        )
    read = attention_mask is not None and attention_mask.dim() == 4 and attention_mask.dtype == torch.int32
    if attention_mask is not None and attention_mask.dim() != 2 and not (read and attention_mask.shape[-1] == 2):
        raise ModelError(
            f"{name}: attention mask of shape {list(attention_mask.shape)}; allowed is [batch, keys], 0 is padding;"
            " pack documents with position_ids that restart at 0 instead of a mask"
        )
    for unsupported, meaning in _UNSUPPORTED.items():
        if kwargs.get(unsupported) is not None and kwargs[unsupported] is not False:
            raise ModelError(f"{name}: {unsupported} ({meaning}) is not supported; use attention 'eager' or 'sdpa'")


_UNSUPPORTED = {
    "position_bias": "a learned bias per distance",
    "cache": "the paged cache of continuous batching",
    "output_attentions": "attention weights, which never exist as a whole",
}


def _same_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, do what torch's own attention does: run in the autocast dtype."""
    dtype = autocast_dtype(q.device)
    if dtype is not None and q.dtype != torch.float64:
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v
