"""What a layer asks of its attention besides queries, keys and values."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longfit.attention.visibility import Schedule, build_schedule, document_starts


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Which keys a layer's queries may see, and how scores become weights.

    Attributes:
        scaling: of the scores.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma-2); None is off.
        group_size: tokens per group of shifted attention; None is exact.
        sliding_window: keys a query sees, itself included; None is no window.
        position_ids: integer ``[B or 1, T]``; a document begins where it is not the next one.
        attention_mask: ``[B, T]``, 0 is padding, or ``[B, 1, T, 2]`` of ``read_mask``; None is no padding.
        cu_seqlens: integer ``[documents + 1]``, cumulated lengths of the documents of a single row.
        sinks: ``[H]``, one more logit a head in the softmax, whose value is zero (gpt-oss); None is off.
    """

    scaling: float
    softcap: float | None = None
    group_size: int | None = None
    sliding_window: int | None = None
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    sinks: Tensor | None = None

    def with_positions(self, position_ids: Tensor | None) -> "AttentionSpec":
        """The same with other positions."""
        return replace(self, position_ids=position_ids)

    def one_document(self) -> "AttentionSpec":
        """The same where all tokens belong together, but for padding."""
        return replace(self, position_ids=None, cu_seqlens=None)

    def schedule(self, batch_size: int, num_heads: int, num_tokens: int, device: torch.device) -> Schedule:
        """Say which keys each query of the whole sequence sees.

        On the meta device, where positions have no values, each row is one document; the schedule itself has values.

        Raises: DataError: a hint about documents has the wrong shape. ContextError: a group or window that cannot be.
        """
        if device.type == "meta":
            starts = document_starts(batch_size, num_tokens, device="cpu")
            return build_schedule(num_heads, starts, group_size=self.group_size, sliding_window=self.sliding_window)
        starts = document_starts(
            batch_size,
            num_tokens,
            position_ids=self.position_ids,
            attention_mask=self.attention_mask,
            cu_seqlens=self.cu_seqlens,
            device=device,
        )
        return build_schedule(num_heads, starts, group_size=self.group_size, sliding_window=self.sliding_window)
