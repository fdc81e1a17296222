"""Next-token loss without the logits: linear + cross-entropy over constant-size tiles of tokens and vocabulary.

Full logits cost about 18 bytes x vocabulary for every token (bf16 logits, their fp32 copy, the softmax, its gradient):
2.3 MB a token for a vocabulary of 128k, more than all layers together. Here a tile of tokens meets the output matrix,
its log-sum-exp is made (online over vocabulary tiles when the vocabulary is cut as well), and at once, still in
forward, the gradient of that tile:

    loss  = sum over trained tokens of (log sum_v exp z_v - z_label) / num_items,    z = cap(scale (h W^T + b))
    dh    = ((softmax(z) - onehot(label)) cap'(z) scale / num_items) W

``dh`` may be written over ``h`` itself, so that a token costs one hidden state and nothing that grows with the
vocabulary. Sums over tokens and tiles are float32 (float64 for float64). Rows whose label is -100 are never computed.

Dividing *once*, by the number of trained tokens of the whole optimiser step (``num_items``), makes gradient
accumulation exact: a mean of micro-batch means is another loss when their token counts differ.

Not here: the auxiliary balance loss of mixture-of-experts routers, label smoothing, z-loss.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfit.errors import DataError, ModelError

IGNORED = -100
"""The label of a token that is not trained on (the convention of torch and transformers)."""

TILE_ELEMENTS = 1 << 25
"""Logits held at once: 128 MiB in float32, and as much again in temporaries, whatever the context and vocabulary."""


# ------------------------------------------------------------------------------------------------ the tiled loss
@dataclass(frozen=True)
class _Head:
    """The map from hidden states to logits, asked for one tile of tokens and one slice of the vocabulary at a time."""

    weight: Tensor  # [V, D] in the compute dtype
    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float
    sum_dtype: torch.dtype

    def logits(self, hidden: Tensor, words: slice) -> Tensor:
        """Logits of some tokens for some words, in the dtype of the sums: [t, D] -> [t, v]."""
        bias = None if self.bias is None else self.bias[words]
        logits = F.linear(hidden, self.weight[words], bias).to(self.sum_dtype)
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """d logits / d (h W^T + b) where it is not the constant ``scale``: the derivative of the soft cap."""
        return None if self.softcap is None else (logits / self.softcap).square_().neg_().add_(1.0)


@dataclass(frozen=True)
class _Tiles:
    """Which rows are computed, and in what portions."""

    rows: Tensor  # [M] int64: the rows whose label counts
    token_tile: int
    vocab_tile: int
    num_words: int

    def tokens(self) -> Iterator[Tensor]:
        return iter(self.rows.split(self.token_tile) if len(self.rows) else ())

    def words(self) -> list[slice]:
        return [
            slice(start, min(start + self.vocab_tile, self.num_words))
            for start in range(0, self.num_words, self.vocab_tile)
        ]


def _choose_tiles(labels: Tensor, num_words: int, token_tile: int | None, vocab_tile: int | None) -> _Tiles:
    """Prefer the whole vocabulary for fewer tokens: then the logits of the forward sum also serve the gradient."""
    for name, value in (("token_tile", token_tile), ("vocab_tile", vocab_tile)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1; leave it out to let the engine choose")
    if token_tile is None:
        token_tile = max(128, min(1024, TILE_ELEMENTS // (vocab_tile or num_words)))
    if vocab_tile is None:
        vocab_tile = max(1, min(num_words, TILE_ELEMENTS // token_tile))
    return _Tiles(_trained_rows(labels, num_words), token_tile, min(vocab_tile, num_words), num_words)


def _trained_rows(labels: Tensor, num_words: int) -> Tensor:
    rows = (labels != IGNORED).nonzero().squeeze(1)
    if len(rows):
        low, high = labels[rows].aminmax()
        if low < 0 or high >= num_words:
            raise ValueError(
                f"labels from {int(low)} to {int(high)}: must be token ids below {num_words}, or {IGNORED} for a token "
                "that is not trained on; check that tokenizer and model belong together"
            )
    return rows


def _label_logits(logits: Tensor, labels: Tensor, words: slice) -> Tensor:
    """The label's logit where the label lies among ``words``, else 0: [t, v], [t] -> [t]."""
    local = labels - words.start
    here = (local >= 0) & (local < logits.shape[1])
    found = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    return torch.where(here, found, 0.0)


def _log_sum_exp(head: _Head, hidden: Tensor, labels: Tensor, tiles: _Tiles) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the whole vocabulary and the label's logit, one vocabulary tile at a time: each [t]."""
    total = hidden.new_full((len(hidden),), -torch.inf, dtype=head.sum_dtype)
    label = torch.zeros_like(total)
    for words in tiles.words():
        logits = head.logits(hidden, words)
        label += _label_logits(logits, labels, words)
        total = torch.logaddexp(total, logits.logsumexp(1))
    return total, label


@dataclass(frozen=True)
class _Gradients:
    """Where a tile's gradients go: rows of ``hidden`` are overwritten, ``weight`` and ``bias`` are added to."""

    hidden: Tensor  # [N, D]
    weight: Tensor | None  # [V, D] in the dtype of the sums
    bias: Tensor | None  # [V]

    def add(self, head: _Head, tile: Tensor, d_logits: Tensor, words: slice) -> Tensor:
        """Take the gradient of some logits [t, v]; returns its share of the tile's hidden gradient, [t, D]."""
        if self.bias is not None:
            self.bias[words] += d_logits.sum(0)
        d_logits = d_logits.to(tile.dtype)
        if self.weight is not None:
            self.weight[words] += d_logits.T @ tile
        return d_logits @ head.weight[words]


def _d_logits(
    head: _Head, probabilities: Tensor, slope: Tensor | None, labels: Tensor, words: slice, factor: Tensor
) -> Tensor:
    """(softmax - onehot) cap' scale / num_items, over the storage of ``probabilities``: [t, v]."""
    local = labels - words.start
    here = ((local >= 0) & (local < probabilities.shape[1])).to(probabilities.dtype)
    local = local.clamp(0, probabilities.shape[1] - 1)[:, None]
    probabilities.scatter_add_(1, local, -here[:, None])
    if slope is not None:
        probabilities *= slope
    return probabilities.mul_(factor)


def _tile_loss_and_gradient(
    head: _Head, hidden: Tensor, labels: Tensor, tiles: _Tiles, factor: Tensor, gradients: _Gradients
) -> tuple[Tensor, Tensor]:
    """Losses [t] of one token tile, and its hidden gradient [t, D]."""
    words = tiles.words()
    if len(words) == 1:  # the logits of the sum serve the gradient: one exponential, no second product
        logits = head.logits(hidden, words[0])
        label, slope, largest = _label_logits(logits, labels, words[0]), head.slope(logits), logits.amax(1)
        exponentials = logits.sub_(largest[:, None]).exp_()
        total = exponentials.sum(1)
        probabilities = exponentials.div_(total[:, None])
        d_logits = _d_logits(head, probabilities, slope, labels, words[0], factor)
        return largest + total.log() - label, gradients.add(head, hidden, d_logits, words[0])
    log_sum, label = _log_sum_exp(head, hidden, labels, tiles)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=head.sum_dtype)
    for part in words:
        logits = head.logits(hidden, part)
        slope = head.slope(logits)
        probabilities = logits.sub_(log_sum[:, None]).exp_()
        d_hidden += gradients.add(head, hidden, _d_logits(head, probabilities, slope, labels, part, factor), part)
    return log_sum - label, d_hidden


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in forward and only multiplied by the incoming gradient in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        num_items: Tensor,
        softcap: float | None,
        scale: float,
        tiles: _Tiles,
        compute_dtype: torch.dtype,
        overwrite_hidden: bool,
    ) -> Tensor:
        head = _head(weight, bias, softcap, scale, hidden, compute_dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_gradient = needs_hidden or needs_weight or needs_bias
        d_hidden = hidden if overwrite_hidden and needs_hidden else torch.empty_like(hidden) if needs_hidden else hidden
        gradients = _Gradients(
            d_hidden,
            torch.zeros_like(weight, dtype=head.sum_dtype) if needs_weight else None,
            torch.zeros_like(bias, dtype=head.sum_dtype) if bias is not None and needs_bias else None,
        )
        factor = scale / num_items.to(head.sum_dtype)
        total = torch.zeros((), dtype=head.sum_dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in tiles.tokens():
                tile, tile_labels = hidden[rows].to(compute_dtype), labels[rows]
                if not needs_gradient:
                    log_sum, label = _log_sum_exp(head, tile, tile_labels, tiles)
                    total += (log_sum - label).sum()
                    continue
                losses, d_tile = _tile_loss_and_gradient(head, tile, tile_labels, tiles, factor, gradients)
                total += losses.sum()
                if needs_hidden:
                    d_hidden.index_copy_(0, rows, d_tile.to(d_hidden.dtype))
        if needs_hidden and len(tiles.rows) < len(hidden):
            d_hidden.masked_fill_((labels == IGNORED)[:, None], 0.0)
        ctx.gradients = [d_hidden if needs_hidden else None, gradients.weight, gradients.bias]
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        return total / num_items

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: backward ran twice through one loss; its gradients exist once, made in forward. "
                "Compute the loss again for a second backward"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if g is None else g.mul_(d_loss.to(g.dtype)) for g in gradients]
        return (*(None if g is None else g.to(t) for g, t in zip(scaled, ctx.dtypes, strict=True)), *(None,) * 7)


def _head(
    weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float, hidden: Tensor, compute_dtype: torch.dtype
) -> _Head:
    sum_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.to(compute_dtype)
    return _Head(weight.to(compute_dtype), bias, softcap, scale, sum_dtype)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or labels.dim() != 1:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}: must be "
            "[N, D], [V, D] and [N]; flatten batch and tokens first"
        )
    if hidden.shape[1] != weight.shape[1] or hidden.shape[0] != labels.shape[0]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}: hidden "
            "and weight must share their last size, hidden and labels their first"
        )
    if not weight.is_floating_point():
        raise ValueError(f"weight of dtype {weight.dtype}: must be a float dtype; de-quantise the output matrix first")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    num_items: int | Tensor | None = None,
    token_tile: int | None = None,
    vocab_tile: int | None = None,
    overwrite_hidden: bool = False,
) -> Tensor:
    """Sum of the cross-entropies of ``hidden @ weight.T`` divided by ``num_items``, never holding the logits.

    Args:
        hidden: ``[N, D]``, any float dtype; products run in this dtype (in autocast's where autocast is on).
        weight: ``[V, D]``; receives a gradient if it requires one, summed in float32 (so does ``bias``).
        labels: ``[N]`` int64, already shifted; -100 marks a token that is not trained on.
        bias: ``[V]`` or None.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma-2), after ``scale``.
        scale: factor on the logits (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        num_items: what the sum is divided by; default: the number of labels that count here. Give the count of the
            whole optimiser step when accumulating gradients.
        token_tile: tokens at once; default: as many as keep the logits at ``TILE_ELEMENTS``, within 128 and 1,024.
        vocab_tile: words at once; default: all of them if the token tile allows it. Fewer cost a second product.
        overwrite_hidden: write the gradient over the storage of ``hidden``. Safe when ``hidden`` is an intermediate
            that nothing else reads: not its producer's backward (autograd notices and raises), not the caller. Saves
            one hidden state a token.
    Returns: the loss, float32 (float64 for float64), 0-dim.
    Raises: ValueError: shapes, label range or tile sizes are wrong. DataError: no label counts and no ``num_items``.
    """
    _check_shapes(hidden, weight, labels)
    labels = labels.to(hidden.device)
    tiles = _choose_tiles(labels, weight.shape[0], token_tile, vocab_tile)
    if num_items is None:
        num_items = len(tiles.rows)
        if num_items == 0:
            raise DataError(f"all {len(labels)} labels are {IGNORED}: there is no token to train on; skip such a batch")
    divisor = torch.as_tensor(num_items, device=hidden.device)
    return _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, divisor, softcap, scale, tiles, _compute_dtype(hidden), overwrite_hidden
    )


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    token_tile: int | None = None,
    vocab_tile: int | None = None,
) -> Tensor:
    """Cross-entropy of every token, for evaluation; no gradient.

    Args: as for :func:`linear_cross_entropy`.
    Returns: float32 (float64 for float64) ``[N]``; 0 where the label is -100.
    Raises: ValueError: shapes, label range or tile sizes are wrong.
    """
    _check_shapes(hidden, weight, labels)
    labels = labels.to(hidden.device)
    tiles = _choose_tiles(labels, weight.shape[0], token_tile, vocab_tile)
    compute_dtype = _compute_dtype(hidden)
    head = _head(weight, bias, softcap, scale, hidden, compute_dtype)
    losses = torch.zeros(len(hidden), dtype=head.sum_dtype, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in tiles.tokens():
            log_sum, label = _log_sum_exp(head, hidden[rows].to(compute_dtype), labels[rows], tiles)
            losses[rows] = log_sum - label
    return losses


# ------------------------------------------------------------------------------------------------ the loss of a model
@dataclass(frozen=True)
class OutputHead:
    """What a causal language model does to its hidden states to get logits: cap(scale (h W^T + b))."""

    weight: Tensor  # [V, D]
    bias: Tensor | None
    softcap: float | None
    scale: float


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel, or the model itself.

    Raises: ModelError: it is neither, or the adapter is not one that lives in the layers.
    """
    from peft import PeftModel
    from transformers import PreTrainedModel

    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ModelError(
                f"{type(model.active_peft_config).__name__}: prompt learning changes the inputs of the model, "
                "which the tiled loss does not do; train a LoRA adapter instead"
            )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__}: must be a transformers causal language model or a PeftModel around one"
        )
    return model


def decoder(model: nn.Module) -> nn.Module:
    """The part of a causal language model that ends in hidden states: embeddings, layers, last norm."""
    base = base_model(model)
    found = base.get_decoder()
    if found is base:
        raise ModelError(f"{type(base).__name__} has no output matrix: load it with AutoModelForCausalLM")
    return found


def output_head(model: nn.Module) -> OutputHead:
    """The effective output matrix, with what PEFT has put around it, and the family's scaling of logits.

    Args:
        model: a transformers causal language model, or a PeftModel around one.
    Raises: ModelError: the head is not a linear map whose matrix can be known, or the family's logits are made in a way
        this function does not know.
    """
    base = base_model(model)
    config = base.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise ModelError(
            f"{type(base).__name__}: config.output_router_logits=True adds a router loss to the model's own, which "
            "longfit does not compute; set it to False"
        )
    head = base.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(base).__name__} has no output matrix: load it with AutoModelForCausalLM")
    weight, bias = _effective_linear(head)
    softcap, scale = _logit_rule(config)
    return OutputHead(weight, bias, softcap, scale)


def _effective_linear(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linear map that calling ``head`` computes, through PEFT's wrappers."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        if head.disable_adapters or not set(head.active_adapters) & set(head.modules_to_save):
            return _effective_linear(head.original_module)
        return _effective_linear(head.modules_to_save[head.active_adapters[0]])
    if isinstance(head, LoraLayer):
        return _with_lora(head)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ModelError(
            f"output head {type(head).__name__}: must be a plain Linear, one trained with modules_to_save, or one with "
            "LoRA; leave the head out of quantisation and of other adapter kinds"
        )
    return head.weight, head.bias


def _with_lora(head: Any) -> tuple[Tensor, Tensor | None]:
    """W + sum of scaling B A: one matrix of the head's size, through which autograd reaches A and B."""
    weight, bias = _effective_linear(head.get_base_layer())
    if head.disable_adapters or head.merged:
        return weight, bias
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        dropout = head.training and not isinstance(head.lora_dropout[name], nn.Identity)
        if name in head.lora_magnitude_vector or head.lora_bias.get(name, False) or dropout:
            raise ModelError(
                f"LoRA {name!r} on the output head uses DoRA, a bias or dropout: then no single matrix stands for it; "
                "use plain LoRA without dropout there, or train the head with modules_to_save"
            )
        update = head.scaling[name] * (head.lora_B[name].weight @ head.lora_A[name].weight)
        weight = weight + update.to(weight.dtype)
    return weight, bias


def _logit_rule(config: Any) -> tuple[float | None, float]:
    """Soft cap and factor on the logits, from the config keys by which families announce them.

    Gemma-2/3/4, nanochat: ``final_logit_softcapping``. Cohere: times ``logit_scale``. Granite: divided by
    ``logits_scaling``; HyperCLOVA X multiplies by the same key.
    """
    unknown = {"lm_head_multiplier", "dim_model_base", "logits_soft_cap", "output_logit_soft_cap"} & set(vars(config))
    if unknown:
        raise ModelError(
            f"{config.model_type}: config key {sorted(unknown)[0]!r} changes the logits in a way longfit does not "
            "know; train this model with --engine plain"
        )
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return softcap, float(scale * scaling if config.model_type.startswith("hyperclovax") else scale / scaling)


def shifted_labels(
    input_ids: Tensor, labels: Tensor | None, position_ids: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    """The label of each token is the next one, unless that begins another document or either is padding.

    Args:
        input_ids: ``[B, T]``.
        labels: ``[B, T]``, -100 where not trained; default: ``input_ids`` without padding.
        position_ids: ``[B or 1, T]``; 0 begins a document.
        attention_mask: ``[B, T]``, 0 for padding.
    Returns: int64 ``[B, T]``; the last column is -100.
    Raises: ValueError: shapes disagree.
    """
    for name, value in (("labels", labels), ("attention_mask", attention_mask)):
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(f"{name} {tuple(value.shape)}: must have the shape of input_ids, {tuple(input_ids.shape)}")
    targets = (input_ids if labels is None else labels).clone()
    if position_ids is not None:
        if position_ids.shape[-1] != input_ids.shape[1]:
            raise ValueError(f"position_ids {tuple(position_ids.shape)}: must cover {input_ids.shape[1]} tokens")
        targets.masked_fill_(position_ids.to(targets.device) == 0, IGNORED)
    if attention_mask is not None:
        real = attention_mask.to(targets.device).bool()
        if labels is None:
            targets.masked_fill_(~real, IGNORED)
        targets[:, 1:].masked_fill_(~real[:, :-1], IGNORED)
    return F.pad(targets[:, 1:], (0, 1), value=IGNORED)


def training_loss(
    model: nn.Module,
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Next-token loss of a causal language model: its own decoder, then the tiled loss in place of logits.

    Args:
        model: a transformers causal language model, or a PeftModel around one.
        input_ids: ``[B, T]`` int64.
        labels: ``[B, T]``, not shifted, -100 where not trained; default: every token of ``input_ids`` but padding. The
            first token of a document (position 0 after another token) and a token after padding are never trained on.
        position_ids: ``[B, T]``; restarting at 0 separates packed documents.
        attention_mask: ``[B, T]``, 0 for padding.
        num_items: trained tokens of the whole optimiser step, for exact gradient accumulation; default: of this call.
    Returns: the loss, float32 (float64 for float64), 0-dim.
    Raises: ModelError: the model's head cannot be entered. DataError: no token is trained on. ValueError: shapes.
    """
    targets = shifted_labels(input_ids, labels, position_ids, attention_mask)
    head = output_head(model)
    outputs = decoder(model)(
        input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False, return_dict=True
    )
    hidden = outputs.last_hidden_state.flatten(0, 1)  # [B * T, D]
    return linear_cross_entropy(
        hidden,
        head.weight,
        targets.flatten(),
        bias=head.bias,
        softcap=head.softcap,
        scale=head.scale,
        num_items=num_items,
        overwrite_hidden=not hidden.is_leaf,  # made by the decoder for this call; nobody else holds it
    )


class TrainingLoss(nn.Module):
    """A model whose forward is its training loss: what DDP, FSDP2 and Accelerate wrap, so that their hooks see it."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor] = training_loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, input_ids: Tensor, **arguments: Any) -> Tensor:
        return self.loss(self.model, input_ids, **arguments)
