"""The tiled loss against whole logits: value, every gradient, memory, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longfit.engine.hf_model import OutputHead
from longfit.engine.loss import linear_cross_entropy as tiled
from longfit.engine.working_memory import GRADIENT_ROWS
from longfit.errors import DataError

# float64, sums of at most a few thousand terms of order one in another order: 1e3 x 2.2e-16, with a margin of five.
EXACT = 1e-12


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes, in elements."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def whole_logits_loss(hidden, weight, labels, *, bias=None, softcap=None, scale=1.0, num_items=None):
    """The definition, with every logit at once."""
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return total / (num_items or (labels != -100).sum())


def linear_cross_entropy(hidden, weight, labels, *, bias=None, softcap=None, scale=1.0, **options):
    return tiled.linear_cross_entropy(hidden, OutputHead(weight, bias, softcap, scale), labels, **options)


def token_losses(hidden, weight, labels, *, bias=None, softcap=None, scale=1.0, **options):
    return tiled.token_losses(hidden, OutputHead(weight, bias, softcap, scale), labels, **options)


def problem(num_tokens=37, vocab_size=53, size=16, dtype=torch.float64, ignored=(0, 5, 6, 36)):
    hidden = torch.randn(num_tokens, size, dtype=dtype)
    weight = torch.randn(vocab_size, size, dtype=dtype) * 0.5
    bias = torch.randn(vocab_size, dtype=dtype)
    labels = torch.randint(vocab_size, (num_tokens,))
    labels[list(ignored)] = -100
    return hidden, weight, bias, labels


def gradients(loss_function, hidden, weight, bias, labels, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    # `hidden * 1` is an intermediate, as in a model; its storage may be taken.
    loss = loss_function(leaves[0] * 1, leaves[1], labels, bias=leaves[2], **options)
    (loss * 3.0).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("tiles", [{}, {"token_tile": 1}, {"token_tile": 8, "vocab_tile": 7}, {"vocab_tile": 52}])
@pytest.mark.parametrize(
    "logits", [{}, {"scale": 0.25}, {"softcap": 2.0}, {"softcap": 3.0, "scale": 1.7, "num_items": 5}]
)
@pytest.mark.parametrize("overwrite_hidden", [False, True])
def test_value_and_every_gradient_equal_the_definition(tiles, logits, overwrite_hidden):
    case = problem()
    expected = gradients(whole_logits_loss, *case, **logits)
    got = gradients(linear_cross_entropy, *case, **logits, **tiles, overwrite_hidden=overwrite_hidden)
    assert max(relative(g, e) for g, e in zip(got, expected, strict=True)) < EXACT


@pytest.mark.parametrize("vocab_size", [GRADIENT_ROWS, 2 * GRADIENT_ROWS + 1])
def test_the_gradient_of_many_words_is_added_in_parts(vocab_size):
    hidden, weight, bias, labels = problem(num_tokens=9, vocab_size=vocab_size, size=4, ignored=(2,))
    got = gradients(linear_cross_entropy, hidden, weight, bias, labels, token_tile=4)
    expected = gradients(whole_logits_loss, hidden, weight, bias, labels)
    assert max(map(relative, got, expected)) < EXACT


def test_token_losses_are_the_terms_of_the_sum():
    hidden, weight, bias, labels = problem()
    for tiles in ({}, {"token_tile": 5, "vocab_tile": 9}):
        losses = token_losses(hidden, weight, labels, bias=bias, softcap=2.0, scale=0.7, **tiles)
        logits = 2.0 * torch.tanh(F.linear(hidden, weight, bias) * 0.7 / 2.0)
        expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        assert relative(losses, expected) < EXACT
    assert token_losses(hidden.bfloat16(), weight.bfloat16(), labels).dtype == torch.float32


def test_the_gradient_takes_the_storage_of_an_intermediate():
    hidden, weight, _, labels = problem()
    leaf = hidden.clone().requires_grad_()
    middle = leaf * 1
    linear_cross_entropy(middle, weight, labels, overwrite_hidden=True).backward()
    assert torch.equal(middle.detach(), leaf.grad)
    kept = leaf.detach().clone().requires_grad_() * 1
    before = kept.detach().clone()
    linear_cross_entropy(kept, weight, labels).backward()
    assert torch.equal(kept, before)


def test_autograd_notices_when_the_storage_was_needed():
    hidden, weight, _, labels = problem()
    needed = hidden.clone().requires_grad_().exp()  # exp saves its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        linear_cross_entropy(needed, weight, labels, overwrite_hidden=True).backward()


def test_without_gradient_hidden_is_left_alone():
    hidden, weight, bias, labels = problem()
    before = hidden.clone()
    with torch.no_grad():
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        loss = linear_cross_entropy(*leaves, labels, bias=bias, overwrite_hidden=True, token_tile=8, vocab_tile=10)
    assert torch.equal(hidden, before)
    assert relative(loss, whole_logits_loss(hidden, weight, labels, bias=bias)) < EXACT


def test_micro_batches_with_num_items_add_up_to_the_whole():
    hidden, weight, bias, labels = problem()
    whole = gradients(linear_cross_entropy, hidden, weight, bias, labels)
    count = int((labels != -100).sum())
    parts = [
        gradients(linear_cross_entropy, hidden[rows], weight, bias, labels[rows], num_items=count)
        for rows in (slice(0, 7), slice(7, 8), slice(8, 37))
    ]
    loss, weight_gradient = (sum(part[i] for part in parts) for i in (0, 2))
    assert relative(loss, whole[0]) < EXACT
    assert relative(weight_gradient, whole[2]) < EXACT
    assert relative(torch.cat([part[1] for part in parts]), whole[1]) < EXACT


def test_a_masked_micro_batch_counts_for_nothing():
    hidden, weight, bias, labels = problem()
    loss, d_hidden, d_weight, d_bias = gradients(
        linear_cross_entropy, hidden, weight, bias, labels.fill_(-100), num_items=9, overwrite_hidden=True
    )
    assert loss == 0
    assert not any(g.any() for g in (d_hidden, d_weight, d_bias))


def test_ignored_rows_are_never_computed():
    hidden, weight, bias, labels = problem()
    expected = gradients(linear_cross_entropy, hidden, weight, bias, labels)
    hidden[labels == -100] = torch.nan
    got = gradients(linear_cross_entropy, hidden, weight, bias, labels, overwrite_hidden=True, token_tile=4)
    assert max(relative(g, e) for g, e in zip(got, expected, strict=True)) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab_tile", [None, 100])
def test_low_precision_is_no_worse_than_whole_logits(dtype, vocab_tile):
    """Against float64 of the same rounded inputs. Both round the logits and their gradient to ``dtype``, so the errors
    are alike; 1.3 allows for another order of additions."""
    case = problem(300, 530, 64, dtype)
    truth = gradients(whole_logits_loss, *(t.double() for t in case[:3]), case[3])
    plain = gradients(lambda h, w, y, bias: F.cross_entropy(F.linear(h, w, bias).float(), y), *case)
    ours = gradients(linear_cross_entropy, *case, token_tile=64, vocab_tile=vocab_tile)
    assert ours[0].dtype == torch.float32
    for name, o, p, t in zip(("loss", "hidden", "weight", "bias"), ours, plain, truth, strict=True):
        limit = 1.3 * relative(p.double(), t) + torch.finfo(torch.float32).eps * 8
        assert relative(o.double(), t) < limit, name


def test_large_logits_and_masked_words_stay_finite():
    hidden, weight, bias, labels = problem()
    bias[40:] = -torch.inf  # words that cannot be said, among them a whole vocabulary tile
    labels[labels >= 40] = 3
    for tiles in ({}, {"vocab_tile": 6}):
        got = gradients(linear_cross_entropy, hidden * 300, weight, bias, labels, **tiles)
        expected = gradients(whole_logits_loss, hidden * 300, weight, bias, labels)
        assert all(relative(g, e) < EXACT for g, e in zip(got, expected, strict=True))


def test_autocast_sets_the_dtype_of_the_products():
    hidden, weight, _, labels = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    expected = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.full((37,), 53)}, ValueError, "token ids below 53"),
        ({"labels": torch.full((37,), -1)}, ValueError, "labels from -1"),
        ({"labels": torch.full((37,), -100)}, DataError, "no token to train on"),
        ({"labels": torch.zeros(36, dtype=torch.long)}, ValueError, r"must be \[..., D\]"),
        ({"hidden": torch.zeros(37, 15)}, ValueError, "share their last size"),
        ({"weight": torch.zeros(53, 16, dtype=torch.uint8)}, ValueError, "de-quantise"),
        ({"token_tile": 0}, ValueError, "token_tile=0"),
    ],
)
def test_errors_say_what_to_do(change, error, message):
    hidden, weight, _, labels = problem()
    with pytest.raises(error, match=message):
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "labels": labels} | change))


def test_a_second_backward_raises():
    hidden, weight, _, labels = problem()
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


def test_whole_logits_are_never_held():
    hidden, weight, _, labels = problem(num_tokens=2400, vocab_size=5000, size=48)
    with LargestTensor() as seen:
        linear_cross_entropy(
            hidden.clone().requires_grad_(), weight.requires_grad_(), labels, token_tile=128, vocab_tile=700
        )
    assert seen.elements == weight.numel()  # its gradient; the logits would be 2400 x 5000
    with LargestTensor() as seen:
        token_losses(hidden, weight, labels, token_tile=64)
    assert seen.elements == 64 * 5000


def test_a_leaf_that_asks_for_wide_gradients_gets_them():
    hidden = torch.randn(6, 8, dtype=torch.float16)
    weight = torch.randn(11, 8, dtype=torch.float16, requires_grad=True)
    weight.grad_dtype = torch.float32
    (linear_cross_entropy(hidden, weight, torch.arange(6)) * 2.0**-30).backward()
    assert weight.grad.dtype == torch.float32
    # Times 2^-30 the gradients lie below float16's smallest number, 2^-24, and would all be 0 there.
    assert 0 < weight.grad.abs().max() < 2.0**-24
