"""Linear4bit: equals a dense layer that holds dq(W), keeps no 16-bit copy, is an ordinary module otherwise."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longfit.layers.linear4bit import Linear4bit
from longfit.numerics.quant_state import dequantize_4bit, quantize_4bit

# In % 64 == 0 keeps rows apart; the others make blocks run across rows.
SHAPES = [(64, 128), (100, 64), (40, 96), (33, 80), (7, 160), (1, 2)]


def make(out_features: int, in_features: int, *, dtype: torch.dtype = torch.float32, bias: bool = False, **options):
    dense = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    return dense, Linear4bit.from_linear(dense, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_holds_what_the_reference_holds(shape, double_quant):
    dense, layer = make(*shape, double_quant=double_quant)
    packed, state = quantize_4bit(dense.weight.detach(), double_quant=double_quant)
    assert torch.equal(layer.dequantize(), dequantize_4bit(packed, state))
    assert torch.equal(layer.packed()[0], packed)
    assert layer.weight.dtype == torch.uint8
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward_and_input_gradient_equal_dense(shape, dtype):
    _, layer = make(*shape, bias=True)
    weight = layer.dequantize(dtype)
    x = torch.randn(2, 3, shape[1], dtype=dtype)
    grad = torch.randn(2, 3, shape[0], dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(a).backward(grad)
    F.linear(b, weight, layer.bias.to(dtype)).backward(grad)
    # Both round the same products once per output; only the order of at most 160 additions may differ.
    tolerance = 160 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias.to(dtype)), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)


def test_keeps_only_packed_bytes_for_backward():
    _, layer = make(64, 128)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(5, 128, requires_grad=True))
    assert saved
    assert all(tensor.dtype == torch.uint8 for tensor in saved)
    assert sum(tensor.nbytes for tensor in saved) < 64 * 128


def test_backward_reads_the_storage_of_its_time():
    """Weights may be streamed out and in again between forward and backward, into the same storage."""
    _, layer = make(64, 128)
    x = torch.randn(5, 128, requires_grad=True)
    y = layer(x)
    held = layer.weight.data.clone()
    layer.weight.data.zero_()
    layer.weight.data.copy_(held)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize(torch.float32).sum(0).expand(5, 128))


def test_train_eval_train_keeps_gradients_and_bytes():
    _, layer = make(96, 64, bias=True)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    grads = []
    for training in (True, False, True):
        layer.train(training)
        x = torch.ones(4, 64, requires_grad=True)
        if training:
            layer(x).sum().backward()
            grads.append(x.grad)
        else:
            with torch.no_grad():
                layer(x.detach())
    assert torch.equal(*grads)
    after = layer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_copy_pickle_state_dict_and_casts_keep_the_bytes():
    _, layer = make(48, 192, bias=True)
    expected = layer.dequantize()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).to(torch.bfloat16)):
        assert torch.equal(other.dequantize(), expected)
    fresh = Linear4bit.placeholder(layer.row_format, bias=True, bias_dtype=torch.float32, device="cpu")
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(fresh.dequantize(), expected)


def test_a_row_shard_is_a_slice_of_the_parameter():
    _, layer = make(64, 128)
    assert layer.weight.shape == (64, 64 + 2)  # 64 bytes of codes, 2 of block constants


def test_autocast_computes_in_its_dtype():
    _, layer = make(64, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 128)).dtype == torch.bfloat16


def test_is_an_nn_linear_and_says_what_it_is():
    _, layer = make(64, 128)
    assert isinstance(layer, nn.Linear)
    assert "nf4" in repr(layer)
    assert "in_features=128" in repr(layer)
