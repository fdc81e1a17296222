"""Shifted sparse attention (S2-Attn) as an index, and its dense reference (LongLoRA, section 3.2).

The paper cuts the sequence into groups of ``group_size`` tokens and lets each token attend within its group; for half
of the heads the group boundaries move by half a group, so that information crosses them. The paper's algorithm 1 rolls
the tokens instead; rolling glues the end of the text to its beginning and lets the first tokens see the last ones. Here
the boundaries move and the tokens stay, so there is nothing to leak and any length works:

    group of token t     (t + shift) // group_size         shift = 0 for heads [0, H // 2), group_size // 2 for the rest
    t sees j             j <= t, same group, same document
    hence                j in [first_key(t), t]            one contiguous range, whatever the length

In packed rows t counts from the start of its document, so groups restart there. The first and the last shifted group
may be half groups. With one query head everything is shifted; key/value heads play no part in the split.

This file is the oracle: it builds the full mask. Training uses ``attention/hf_attention.py``, which never does.
"""

import torch
from torch import Tensor


def group_ids(positions: Tensor, *, group_size: int, shift: int = 0) -> Tensor:
    """Number the group of each position: ``(position + shift) // group_size`` (LongLoRA, section 3.2).

    Args:
        positions: integer, any shape; tokens counted from the start of their document.
        group_size: tokens per group; even, at least 2.
        shift: tokens by which the boundaries move to the left; 0 or ``group_size // 2``.
    Returns: integer, shape of ``positions``.
    Raises: ValueError: ``group_size`` is odd or below 2.
    """
    if group_size < 2 or group_size % 2:
        raise ValueError(f"group_size {group_size}: must be an even number of tokens, at least 2")
    return (positions + shift).div(group_size, rounding_mode="floor")


def first_key(document_start: Tensor, *, group_size: int, shift: int = 0) -> Tensor:
    """Find the first key each query may see; it sees all keys from there to itself (LongLoRA, section 3.2).

    Args:
        document_start: integer ``[..., T]``, index of the first token of the document that each token belongs to.
        group_size, shift: as in ``group_ids``.
    Returns: integer ``[..., T]``.
    Raises: ValueError: ``group_size`` is odd or below 2.
    """
    positions = torch.arange(document_start.shape[-1], device=document_start.device) - document_start
    group_start = group_ids(positions, group_size=group_size, shift=shift) * group_size - shift
    return document_start + group_start.clamp_min(0)


def head_shifts(num_heads: int, *, group_size: int) -> Tensor:
    """Give each query head its shift: none for the first half, half a group for the rest (LongLoRA, section 3.2).

    Args:
        num_heads: H, query heads; may be odd.
        group_size: tokens per group.
    Returns: int64 ``[H]``.
    """
    return torch.where(torch.arange(num_heads) < num_heads // 2, 0, group_size // 2)


def mask(num_heads: int, document_start: Tensor, *, group_size: int | None = None) -> Tensor:
    """Build the full attention mask, True where a query sees a key.

    Args:
        num_heads: H, query heads.
        document_start: integer ``[B, T]``.
        group_size: tokens per group; None is plain causal attention within each document.
    Returns: bool ``[B, H, T, T]``, queries before keys.
    Raises: ValueError: ``group_size`` is odd or below 2.
    """
    batch, tokens = document_start.shape
    t = torch.arange(tokens, device=document_start.device)
    causal = t[:, None] >= t  # [T, T]
    same_document = document_start[:, :, None] == document_start[:, None, :]  # [B, T, T]
    visible = (causal & same_document)[:, None].expand(batch, num_heads, tokens, tokens)
    if group_size is None:
        return visible
    positions = (t - document_start)[:, None]  # [B, 1, T]
    shift = head_shifts(num_heads, group_size=group_size).to(t.device)[:, None]  # [H, 1]
    group_ids(positions, group_size=group_size)  # checks the size; the line below needs a shift per head
    group = (positions + shift) // group_size  # [B, H, T]
    return visible & (group[..., :, None] == group[..., None, :])


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scaling: float | None = None, softcap: float | None = None
) -> Tensor:
    """Attend with an explicit mask: ``softmax(q k^T scaling) v`` over the visible keys.

    Args:
        q: ``[B, H, T, D]``.
        k, v: ``[B, K, T, D]``; query head h reads key/value head ``h // (H // K)``.
        visible: bool, broadcastable to ``[B, H, T, T]``; each query sees at least one key.
        scaling: of the scores; ``D ** -0.5`` by default.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask (Gemma-2); None is off.
    Returns: ``[B, H, T, D]`` in the dtype of ``q``; everything is computed in it.
    """
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)  # [B, H, T, D]
    scores = q @ k.transpose(-1, -2) * scaling  # [B, H, T, T]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


def receptive_field(num_layers: int, group_size: int) -> int:
    """Bound how far back the last of ``num_layers`` shifted layers depends on its input, in tokens.

    A layer moves information at most to the end of a group, and the next layer's other half of the heads starts half a
    group earlier: L layers reach ``(L + 1) * G / 2`` tokens, the token itself included.
    """
    return (num_layers + 1) * group_size // 2
