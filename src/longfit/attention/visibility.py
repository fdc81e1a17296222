"""Which keys each query may see, as one tensor: query t sees exactly the keys ``first_key[t] .. t``.

Exact, shifted (LongLoRA, section 3.2) and sliding-window attention, packed documents and padding all let a token see
one contiguous range that ends at itself. So a schedule needs only the first key of that range, per class of heads, per
row and per token, and no attention backend has to know why a key is hidden. It never decreases along the tokens.

This is bookkeeping of ``4 * classes`` bytes per token; it is not a mask, and none is ever built from it as a whole.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfit.errors import ContextError, DataError
from longfit.numerics import shifted_attention


@dataclass(frozen=True, eq=False)
class Schedule:
    """The visible keys of every query.

    Attributes:
        first_key: int32 ``[C, B, T]``; query t of a head of class c, of C classes, sees ``first_key[c, b, t] .. t``.
        head_bounds: ``C + 1`` query-head numbers; class c is the heads ``[head_bounds[c], head_bounds[c + 1])``.
        host: ``first_key`` on the CPU, which decides what is launched. Made once, as reading it waits for the device.
    """

    first_key: Tensor
    head_bounds: tuple[int, ...]
    host: Tensor = None  # type: ignore[assignment]  # always set after __post_init__

    def __post_init__(self) -> None:
        if self.host is None:
            object.__setattr__(self, "host", self.first_key.cpu())

    @property
    def num_heads(self) -> int:
        """Query heads of all classes."""
        return self.head_bounds[-1]

    @property
    def num_tokens(self) -> int:
        """Tokens that the schedule covers, T."""
        return self.first_key.shape[-1]

    def since(self, low: int, high: int) -> "Schedule":
        """Take the tokens ``[low, high)``, of which none sees a key before ``low``, numbered from ``low``."""
        here = (slice(None), slice(None), slice(low, high))
        return Schedule(self.first_key[here] - low, self.head_bounds, self.host[here] - low)

    def tile(self, start: int, num_tokens: int) -> Tensor:
        """Take the queries ``[start, start + num_tokens)``: int32 ``[C, B, t]``, a view; key numbers stay global."""
        return self.first_key[:, :, start : start + num_tokens]


def check_group_size(group_size: int) -> None:
    """Refuse a group that has no half.

    Raises: ContextError: ``group_size`` is odd or below 2.
    """
    if group_size < 2 or group_size % 2:
        nearest = max(2, group_size + 1)
        raise ContextError(
            f"group_size {group_size}: must be an even number of tokens, at least 2, because half of the heads"
            f" move their groups by half a group; try group_size {nearest}"
        )


def build_schedule(
    num_heads: int, document_start: Tensor, *, group_size: int | None = None, sliding_window: int | None = None
) -> Schedule:
    """Say which keys a query sees: those of its document, and of these its group or its window (LongLoRA, section 3.2).

    A layer with a sliding window keeps it and ignores ``group_size``: it is already sparse, and was trained so.

    Args:
        num_heads: H, query heads of the layer.
        document_start: integer ``[B, T]``, from ``document_starts``.
        group_size: tokens per group of shifted attention; None is exact attention.
        sliding_window: keys a query sees, itself included; None is no window.
    Returns: a schedule of one class of heads, or two when shifted (heads ``[0, H // 2)`` plain, the rest shifted).
    Raises: ContextError: ``group_size`` is odd or below 2, or ``sliding_window`` below 1.
    """
    start = document_start.to(torch.int32)
    if sliding_window is not None:
        if sliding_window < 1:
            raise ContextError(f"sliding_window {sliding_window}: must be at least 1 token; use None for no window")
        t = torch.arange(start.shape[-1], dtype=torch.int32, device=start.device)
        return Schedule(torch.maximum(start, t - (sliding_window - 1))[None], (0, num_heads))
    if group_size is None:
        return Schedule(start[None], (0, num_heads))
    check_group_size(group_size)
    half = num_heads // 2
    shifts = (0, group_size // 2) if half else (group_size // 2,)  # a single head has no plain half
    classes = [shifted_attention.first_key(start, group_size=group_size, shift=shift) for shift in shifts]
    return Schedule(torch.stack(classes).to(torch.int32), (0, half, num_heads) if half else (0, num_heads))


def document_starts(
    batch_size: int,
    num_tokens: int,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Find the first token of the document that each token belongs to; without any hint, each row is one document.

    The hints may be combined; a document starts wherever one of them says so.

    Args:
        batch_size, num_tokens: B and T.
        position_ids: integer ``[B, T]`` or ``[1, T]``; a document starts where the position is not the next one, as
            transformers has it.
        attention_mask: bool or integer ``[B, T]``, 0 is padding, to the left, to the right or both. Each run of equal
            values is a document of its own: real tokens never see padding, and padding sees itself, so it stays finite.
            Or int32 ``[B, 1, T, 2]`` from ``mask_reading.read_mask``: the first key that a token sees.
        cu_seqlens: integer ``[documents + 1]``, cumulated lengths of the documents of a single row, 0 first and T last.
        device: of the result; by default that of the first hint given.
    Returns: int32 ``[B, T]``, never decreasing along T.
    Raises: DataError: a hint has the wrong shape, or a mask has padding between two real tokens.
    """
    hints = [hint for hint in (position_ids, attention_mask, cu_seqlens) if hint is not None]
    device = device if device is not None or not hints else hints[0].device
    begins = torch.zeros(batch_size, num_tokens, dtype=torch.bool, device=device)
    if position_ids is not None:
        if (
            position_ids.dim() != 2
            or position_ids.shape[0] not in (1, batch_size)
            or position_ids.shape[1] != num_tokens
        ):
            raise _wrong_shape("position_ids", position_ids, f"[{batch_size} or 1, {num_tokens}]")
        begins[:, 1:] |= (position_ids.diff() != 1).to(begins.device)
    read: Tensor | None = None
    if attention_mask is not None and attention_mask.dim() == 4:
        if attention_mask.shape != (batch_size, 1, num_tokens, 2):
            raise _wrong_shape("attention_mask", attention_mask, f"[{batch_size}, 1, {num_tokens}, 2]")
        read = attention_mask[:, 0, :, 0].to(begins.device)
    elif attention_mask is not None:
        if attention_mask.shape != begins.shape:
            raise _wrong_shape("attention_mask", attention_mask, f"[{batch_size}, {num_tokens}]")
        attention_mask = attention_mask.to(begins.device)
        _refuse_holes(attention_mask != 0)
        begins[:, 1:] |= attention_mask[:, 1:] != attention_mask[:, :-1]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if batch_size != 1 or bounds[:1] != [0] or bounds[-1] != num_tokens or bounds != sorted(bounds):
            raise DataError(
                f"cu_seqlens {bounds[:3]}..{bounds[-1:]} for a batch of {batch_size} x {num_tokens} tokens: must rise"
                f" from 0 to {num_tokens} over a single row; flatten the batch into one row"
            )
        begins[0, [bound for bound in bounds if bound < num_tokens]] = True
    t = torch.arange(num_tokens, dtype=torch.int32, device=device)
    starts = torch.where(begins, t, 0).cummax(-1).values.to(torch.int32)
    return starts if read is None else torch.maximum(starts, read)


def keeps_own_structure(attention_mask: Tensor | None) -> bool:
    """Whether a mask that was read says that the layer has a window or chunks of its own."""
    return attention_mask is not None and attention_mask.dim() == 4 and bool(attention_mask[..., 1].any())


def _refuse_holes(real: Tensor) -> None:
    """real: bool [B, T]; more than one run of real tokens in a row cannot be meant as padding."""
    runs = real[:, :1].sum(-1) + (real[:, 1:] & ~real[:, :-1]).sum(-1)  # [B]
    if bool((runs > 1).any()):
        row = int((runs > 1).nonzero()[0])
        raise DataError(
            f"attention_mask: row {row} has {int(runs[row])} runs of real tokens with padding between them; padding may"
            " only stand before or after the text; pack documents with position_ids that restart at 0 instead"
        )


def _wrong_shape(name: str, got: Tensor, allowed: str) -> DataError:
    return DataError(f"{name}: got shape {list(got.shape)}, allowed is {allowed}")
