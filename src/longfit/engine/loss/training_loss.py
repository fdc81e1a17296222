"""The next-token loss of a causal language model: its own decoder, then the tiled loss in place of logits.

Dividing *once*, by the number of trained tokens of the whole optimiser step (``num_items``), makes gradient
accumulation exact: a mean of micro-batch means is another loss when their token counts differ.

Not here: the auxiliary balance loss of mixture-of-experts routers.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfit.attention.visibility import document_starts
from longfit.engine.hf_model import base_model, hidden_states, output_head
from longfit.engine.host_memory import give_back
from longfit.engine.loss.linear_cross_entropy import linear_cross_entropy
from longfit.engine.sweep.install import sweep_by_default
from longfit.engine.sweep.probe import nature_of
from longfit.engine.sweep.sweeper import Sweeper, sweeper_of
from longfit.errors import ModelError
from longfit.numerics.labels import IGNORED


def shifted_labels(
    input_ids: Tensor, labels: Tensor | None, position_ids: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    """The label of each token is the next one, unless that begins another document or either is padding.

    Args:
        input_ids: ``[B, T]``.
        labels: ``[B, T]``, -100 where not trained; default: ``input_ids`` without padding.
        position_ids: ``[B or 1, T]``; a document begins where the position does not increase, as for attention.
        attention_mask: ``[B, T]``, 0 for padding.
    Returns: int64 ``[B, T]``; the last column is -100.
    Raises: ValueError: shapes disagree (DataError, where attention would refuse them too).
    """
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(f"labels {tuple(labels.shape)}: must have the shape of input_ids, {tuple(input_ids.shape)}")
    device = input_ids.device
    targets = (input_ids if labels is None else labels.to(device)).clone()
    starts = document_starts(*input_ids.shape, position_ids=position_ids, attention_mask=attention_mask, device=device)
    targets.masked_fill_(starts == torch.arange(input_ids.shape[1], device=device), IGNORED)
    if attention_mask is not None and labels is None:
        targets.masked_fill_(attention_mask.to(device) == 0, IGNORED)
    return F.pad(targets[:, 1:], (0, 1), value=IGNORED)


def training_loss(
    model: nn.Module,
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_items: int | Tensor | None = None,
    engine: Literal["sweep", "plain"] = "sweep",
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Next-token loss of a causal language model: its own decoder, then the tiled loss in place of logits.

    In training mode the layers are swept: tile by tile along the sequence, so that a token costs a few hidden states
    (``engine/sweep``). The first call sets the sweep up, with what it chooses for the device, and says so in one line;
    ``enable_sweep`` chooses otherwise, ``disable_sweep`` ends it.

    Args:
        model: a transformers causal language model, or a PeftModel around one.
        input_ids: ``[B, T]`` int64.
        labels: ``[B, T]``, not shifted, -100 where not trained; default: every token of ``input_ids`` but padding. The
            first token of a document (position 0 after another token) and a token after padding are never trained on.
        position_ids: ``[B, T]``; restarting at 0 separates packed documents.
        attention_mask: ``[B, T]``, 0 for padding.
        num_items: trained tokens of the whole optimiser step, for exact gradient accumulation; default: of this call.
        engine: ``"plain"`` runs the layers as the model itself does, with ordinary checkpointing if that is on.
        shift_labels: ``[B, T]``, the label of each token itself, instead of ``labels``: for a part of a sequence.
    Returns: the loss, float32 (float64 for float64), 0-dim.
    Raises: ModelError: the model's head cannot be entered, its attention cannot be swept, or it mixes packed documents.
        DataError: no token is trained on. ValueError: shapes, or an unknown ``engine``.
    """
    targets = shift_labels
    if targets is None:
        targets = shifted_labels(input_ids, labels, position_ids, attention_mask)
    sweeper = _sweeper(model, engine)
    nature = nature_of(model)
    nature.require_head()
    sweeps = sweeper is not None and engine == "sweep" and sweeper.sweeps_now
    packs = nature.packs_swept if sweeps else nature.packs
    if packs is not None and position_ids is not None and _trains_later_documents(targets, position_ids):
        raise ModelError(
            f"{packs}: packed documents would see each other; give each row one document, shorter ones padded"
            " behind (labels -100)"
        )
    if attention_mask is not None and nature.causal is None and not bool((attention_mask.int().diff() > 0).any()):
        attention_mask = None  # padding behind the text: nothing before it sees it, and it has no target
    give_back(input_ids.device)
    with nullcontext() if sweeper is None or engine == "sweep" else sweeper.plain():
        hidden, norm = hidden_states(
            model,
            defer_norm=nature.ends_in_norm,
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
            return_dict=True,
        )
    give_back(input_ids.device)
    head_module = base_model(model).get_output_embeddings()
    with nullcontext() if sweeper is None else sweeper.present(head_module, backward=torch.is_grad_enabled()):
        loss = linear_cross_entropy(
            hidden,
            output_head(model),
            targets,
            norm=norm,
            num_items=num_items,
            overwrite_hidden=not hidden.is_leaf and hidden.is_contiguous(),  # the decoder made it for this call alone
        )
    give_back(input_ids.device)
    return loss


def _sweeper(model: nn.Module, engine: str) -> Sweeper | None:
    """The sweep of a model, set up now if it is wanted and missing."""
    if engine not in ("sweep", "plain"):
        raise ValueError(f"engine {engine!r}: must be 'sweep' or 'plain'")
    trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())
    if engine == "plain" or not trains:
        return sweeper_of(model)
    if not model.training:
        warnings.warn(
            "the model is in eval mode, so its layers are neither swept nor checkpointed; call model.train() first",
            stacklevel=3,
        )
        return sweeper_of(model)
    return sweep_by_default(model)


def _trains_later_documents(targets: Tensor, position_ids: Tensor) -> bool:
    """Whether a document that does not begin its row has a target; padding behind a document has none."""
    starts = document_starts(*targets.shape, position_ids=position_ids, device=targets.device)
    return bool(((starts > 0) & (targets != IGNORED)).any())


class TrainingLoss(nn.Module):
    """A model whose forward is its training loss: what DDP, FSDP2 and Accelerate wrap, so that their hooks see it."""

    def __init__(
        self,
        model: nn.Module,
        *,
        engine: Literal["sweep", "plain"] = "sweep",
        loss: Callable[..., Tensor] = training_loss,
    ) -> None:
        super().__init__()
        self.model = model
        self.engine: Literal["sweep", "plain"] = engine
        self.loss = loss

    def forward(self, input_ids: Tensor, **arguments: Any) -> Tensor:
        return self.loss(self.model, input_ids, engine=self.engine, **arguments)
