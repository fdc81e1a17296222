"""Linear + cross-entropy without the logits, over constant-size tiles of tokens and vocabulary.

Full logits cost about 18 bytes x vocabulary for every token (bf16 logits, their fp32 copy, the softmax, its gradient):
2.3 MB a token for a vocabulary of 128k, more than all layers together. Here a tile of tokens meets the output matrix,
its log-sum-exp is made (online over vocabulary tiles when the vocabulary is cut as well), and at once, still in
forward, the gradient of that tile:

    loss  = sum over trained tokens of (log sum_v exp z_v - z_label) / num_items,    z = cap(scale (h W^T + b))
    dh    = ((softmax(z) - onehot(label)) cap'(z) scale / num_items) W

``dh`` may be written over ``h`` itself, so that a token costs one hidden state and nothing that grows with the
vocabulary. Sums over tokens and tiles are float32 (float64 for float64). Rows whose label is -100 are never computed.

Not here: label smoothing, z-loss; where labels come from is ``training_loss.py``.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longfit.compat.torch import autocast_dtype, without_autocast
from longfit.engine.hf_model import OutputHead
from longfit.engine.loss.logits import LogitsBuffers, LossTiles, TiledHead, label_logits, log_sum_exp
from longfit.engine.sweep.grad_donation import donate, receiver_of
from longfit.engine.working_memory import GRADIENT_ROWS
from longfit.errors import DataError
from longfit.kernels.cpu import elementwise as cpu_elementwise
from longfit.kernels.elementwise import runs_kernel
from longfit.numerics.labels import IGNORED


@dataclass(frozen=True)
class _Gradients:
    """Sums of the gradients of what all tiles share."""

    weight: Tensor | None  # [V, D] in the dtype of the sums
    bias: Tensor | None  # [V]

    def add(self, head: TiledHead, tile: Tensor, d_logits: Tensor, vocab_slice: slice) -> Tensor:
        """Take the gradient of some logits [t, v]; returns its share of the tile's hidden gradient, [t, D]."""
        if self.bias is not None:
            self.bias[vocab_slice] += d_logits.sum(0)
        if d_logits.dtype != tile.dtype:
            d_logits = d_logits.to(tile.dtype) if head.buffers is None else head.buffers.narrowed(d_logits)
        if self.weight is not None:
            for part, d_part in zip(
                self.weight[vocab_slice].split(GRADIENT_ROWS), d_logits.T.split(GRADIENT_ROWS), strict=True
            ):
                part += d_part @ tile
        return d_logits @ head.weight[vocab_slice]


def _d_logits(
    head: TiledHead, probabilities: Tensor, slope: Tensor | None, labels: Tensor, vocab_slice: slice, factor: Tensor
) -> Tensor:
    """(softmax - onehot) cap' scale / num_items, over the storage of ``probabilities``: [t, v]."""
    local = labels - vocab_slice.start
    here = ((local >= 0) & (local < probabilities.shape[1])).to(probabilities.dtype)
    local = local.clamp(0, probabilities.shape[1] - 1)[:, None]
    probabilities.scatter_add_(1, local, -here[:, None])
    if slope is not None:
        probabilities *= slope
    return probabilities.mul_(factor)


def _tile_loss_and_gradient(
    head: TiledHead, hidden: Tensor, labels: Tensor, tiles: LossTiles, factor: Tensor, gradients: _Gradients
) -> tuple[Tensor, Tensor]:
    """Losses [t] of one token tile, and its hidden gradient [t, D]."""
    slices = tiles.vocab_slices()
    if len(slices) == 1 and head.buffers is not None and _fits_kernel(head, hidden):
        d_logits = head.buffers.products(hidden, head.weight, None)  # in bf16, and their gradient in their place
        losses = cpu_elementwise.cross_entropy_(d_logits, labels, factor=float(factor))
        return losses, gradients.add(head, hidden, d_logits, slices[0])
    if len(slices) == 1:  # the logits of the sum serve the gradient: one exponential, no second product
        logits = head.logits(hidden, slices[0])
        label, slope, largest = label_logits(logits, labels, slices[0]), head.slope(logits), logits.amax(1)
        exponentials = logits.sub_(largest[:, None]).exp_()
        total = exponentials.sum(1)
        probabilities = exponentials.div_(total[:, None])
        d_logits = _d_logits(head, probabilities, slope, labels, slices[0], factor)
        return largest + total.log() - label, gradients.add(head, hidden, d_logits, slices[0])
    log_sum, label = log_sum_exp(head, hidden, labels, tiles)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=head.sum_dtype)
    for part in slices:
        logits = head.logits(hidden, part)
        slope = head.slope(logits)
        probabilities = logits.sub_(log_sum[:, None]).exp_()
        d_hidden += gradients.add(head, hidden, _d_logits(head, probabilities, slope, labels, part, factor), part)
    return log_sum - label, d_hidden


def _fits_kernel(head: TiledHead, hidden: Tensor) -> bool:
    """Whether the kernel makes the gradient from the logits: bf16 on the CPU, and logits that are products alone."""
    plain = head.bias is None and head.softcap is None and head.scale == 1.0
    return plain and runs_kernel("cross_entropy", hidden)


def _gradient_dtype(tensor: Tensor) -> torch.dtype:
    """What a gradient is handed on in: a leaf may ask for more than its own dtype (``training/loss_scale.py``)."""
    return (tensor.grad_dtype or tensor.dtype) if tensor.is_leaf else tensor.dtype


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
        rule: tuple[float | None, float],
        tiles: LossTiles,
        norm: nn.Module | None,
        overwrite_hidden: bool,
        *norm_parameters: Tensor,
    ) -> Tensor:
        ctx.receiver = receiver_of(hidden)
        compute_dtype = _compute_dtype(hidden, norm)
        head = TiledHead.of(OutputHead(weight, bias, *rule), compute_dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_gradient = any(ctx.needs_input_grad)
        if needs_gradient:
            num_logits = min(tiles.token_tile, len(tiles.rows)) * tiles.vocab_tile
            dtypes = {"dtype": compute_dtype, "sum_dtype": head.sum_dtype}
            head = replace(head, buffers=LogitsBuffers(hidden, num_logits=num_logits, **dtypes))
        d_hidden = hidden if overwrite_hidden or not needs_hidden else hidden.new_empty(hidden.shape)
        rows_of_hidden, rows_of_gradient = hidden.flatten(0, -2), d_hidden.view(-1, hidden.shape[-1])
        gradients = _Gradients(
            torch.zeros_like(weight, dtype=head.sum_dtype) if needs_weight else None,
            torch.zeros_like(bias, dtype=head.sum_dtype) if bias is not None and needs_bias else None,
        )
        d_norm = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in norm_parameters]
        factor = head.scale / num_items.to(head.sum_dtype)
        total = torch.zeros((), dtype=head.sum_dtype, device=hidden.device)
        for rows in tiles.tokens():
            before, tile_labels = rows_of_hidden[rows].requires_grad_(needs_gradient), labels[rows]
            with torch.set_grad_enabled(needs_gradient):
                after = before if norm is None else norm(before[None])[0]
            tile = after.detach().to(compute_dtype)
            with without_autocast(hidden.device):
                if not needs_gradient:
                    log_sum, label = log_sum_exp(head, tile, tile_labels, tiles)
                    total += (log_sum - label).sum()
                    continue
                losses, d_tile = _tile_loss_and_gradient(head, tile, tile_labels, tiles, factor, gradients)
                total += losses.sum()
            d_before, *shares = torch.autograd.grad(after, [before, *norm_parameters], d_tile.to(after.dtype))
            for d_parameter, share in zip(d_norm, shares, strict=True):
                d_parameter += share
            if needs_hidden:
                rows_of_gradient.index_copy_(0, rows, d_before.to(d_hidden.dtype))
        if needs_hidden and len(tiles.rows) < len(rows_of_hidden):
            rows_of_gradient.masked_fill_((labels == IGNORED)[:, None], 0.0)
        ctx.gradients = [d_hidden if needs_hidden else None, gradients.weight, gradients.bias, *d_norm]
        ctx.dtypes = [None if t is None else _gradient_dtype(t) for t in (hidden, weight, bias, *norm_parameters)]
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
        scaled = [
            None if g is None else g.mul_(d_loss.to(g.dtype)).to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        if scaled[0] is not None:
            donate(ctx.receiver, scaled[0])
        return (*scaled[:3], *(None,) * 6, *scaled[3:])


def _compute_dtype(hidden: Tensor, norm: nn.Module | None) -> torch.dtype:
    asked = autocast_dtype(hidden.device)
    if asked is not None:
        return asked
    if norm is None:
        return hidden.dtype
    with torch.no_grad():
        return norm(hidden[..., :0, :]).dtype


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.dim() < 2 or weight.dim() != 2 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}: must be "
            "[..., D], [V, D] and [...]"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}: must share their last size, which is the "
            "model's hidden size"
        )
    if not weight.is_floating_point():
        raise ValueError(f"weight of dtype {weight.dtype}: must be a float dtype; de-quantise the output matrix first")


def linear_cross_entropy(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    *,
    norm: nn.Module | None = None,
    num_items: int | Tensor | None = None,
    token_tile: int | None = None,
    vocab_tile: int | None = None,
    overwrite_hidden: bool = False,
) -> Tensor:
    """Sum of the cross-entropies of a model's logits divided by ``num_items``, never holding the logits.

    Args:
        hidden: ``[..., D]``, any float dtype; products run in this dtype (in autocast's where autocast is on).
        head: what makes logits of them; its weight and bias receive gradients if they require them, summed in float32.
        labels: ``[...]`` int64, already shifted; -100 marks a token that is not trained on.
        norm: a module applied to each tile of ``hidden`` first; it works per token, and may be trained.
        num_items: what the sum is divided by; default: the number of labels that count here. Give the count of the
            whole optimiser step when accumulating gradients.
        token_tile: tokens at once; default: as many as ``CPU_LOGITS`` or ``DEVICE_LOGITS`` allow, within 128 and 1,024.
        vocab_tile: logits a token at once; default: all of them if the token tile allows it. Fewer cost a second
            product.
        overwrite_hidden: write the gradient over the storage of ``hidden``, which must be contiguous. Safe when
            ``hidden`` is an intermediate that nothing else reads: not its producer's backward (autograd notices and
            raises), not the caller. Saves one hidden state a token.
    Returns: the loss, float32 (float64 for float64), 0-dim.
    Raises: ValueError: shapes, label range or tile sizes are wrong. DataError: no label counts and no ``num_items``.
    """
    weight, bias = head.weight, head.bias
    _check_shapes(hidden, weight, labels)
    labels = labels.to(hidden.device).flatten()
    tiles = LossTiles.choose(labels, weight.shape[0], token_tile=token_tile, vocab_tile=vocab_tile)
    if num_items is None:
        num_items = len(tiles.rows)
        if num_items == 0:
            raise DataError(f"all {len(labels)} labels are {IGNORED}: there is no token to train on; skip such a batch")
    divisor = torch.as_tensor(num_items, device=hidden.device)
    trained = [] if norm is None else [p for p in norm.parameters() if p.requires_grad]
    if not torch.is_grad_enabled():  # a Function is told what its inputs require, not that nobody will ask for it
        hidden, weight, bias, trained = hidden.detach(), weight.detach(), None if bias is None else bias.detach(), []
    return _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, divisor, (head.softcap, head.scale), tiles, norm, overwrite_hidden, *trained
    )


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    *,
    norm: nn.Module | None = None,
    token_tile: int | None = None,
    vocab_tile: int | None = None,
) -> Tensor:
    """Cross-entropy of every token, for evaluation; no gradient.

    Args: as for :func:`linear_cross_entropy`.
    Returns: float32 (float64 for float64), in the shape of ``labels``; 0 where the label is -100.
    Raises: ValueError: shapes, label range or tile sizes are wrong.
    """
    _check_shapes(hidden, head.weight, labels)
    shape, labels = labels.shape, labels.to(hidden.device).flatten()
    tiles = LossTiles.choose(labels, head.weight.shape[0], token_tile=token_tile, vocab_tile=vocab_tile)
    compute_dtype = _compute_dtype(hidden, norm)
    tiled = TiledHead.of(head, compute_dtype)
    losses = torch.zeros(len(labels), dtype=tiled.sum_dtype, device=hidden.device)
    hidden = hidden.flatten(0, -2)
    for rows in tiles.tokens():
        tile = hidden[rows] if norm is None else norm(hidden[rows][None])[0]
        with without_autocast(hidden.device):
            log_sum, label = log_sum_exp(tiled, tile.to(compute_dtype), labels[rows], tiles)
        losses[rows] = log_sum - label
    return losses.view(shape)
