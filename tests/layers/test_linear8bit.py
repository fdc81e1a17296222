"""Linear8bit: equals a dense layer that holds dq(W), or LLM.int8(); keeps no 16-bit copy, moves like any module."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longfit.layers.linear8bit import Linear8bit, join_rows, split_rows
from longfit.numerics.vectorwise import dequantize_vectors, linear_int8, quantize_vectors

SHAPES = [(64, 128), (100, 64), (33, 80), (7, 161), (1, 1)]


def make(out_features, in_features, *, dtype=torch.float32, bias=False, threshold=None):
    dense = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    return dense, Linear8bit.from_linear(dense, threshold=threshold)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holds_what_the_reference_holds(shape, dtype):
    dense, layer = make(*shape, dtype=dtype)
    codes, absmax = quantize_vectors(dense.weight.detach())
    assert torch.equal(layer.codes_and_absmax()[0], codes)
    assert torch.equal(layer.codes_and_absmax()[1], absmax)
    assert torch.equal(layer.dequantize(), dequantize_vectors(codes, absmax, dtype=dtype))
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("threshold", [None, 6.0, 0.0])
def test_forward_and_input_gradient(shape, dtype, threshold):
    _, layer = make(*shape, bias=True, threshold=threshold)
    x = torch.randn(2, 3, shape[1], dtype=dtype)
    x[0, 0, 0] = 9.0
    grad = torch.randn(2, 3, shape[0], dtype=dtype)
    a = x.clone().requires_grad_()
    y = layer(a)
    y.backward(grad)
    assert y.dtype == dtype
    weight = layer.dequantize(dtype)
    if threshold is None:
        expected = F.linear(x, weight)
    else:
        expected = linear_int8(x, *layer.codes_and_absmax(), threshold=threshold)
    # The order of at most 161 additions may differ; integer products are rounded to fp32 once more.
    tolerance = 161 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if threshold is not None else 0)
    torch.testing.assert_close(y, expected + layer.bias.to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.grad, grad @ weight, rtol=tolerance, atol=tolerance)


def test_keeps_only_bytes_for_backward():
    _, layer = make(64, 128)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(5, 128, requires_grad=True))
    assert all(not tensor.is_floating_point() for tensor in saved)


def test_rows_can_be_cut_anywhere():
    """A shard of rows is a layer of its own: this is what FSDP relies on."""
    _, layer = make(33, 80)
    x = torch.randn(4, 80)
    parts = [Linear8bit(rows, dtype=torch.float32) for rows in layer.weight.data.split([10, 1, 22])]
    torch.testing.assert_close(torch.cat([part(x) for part in parts], dim=1), layer(x), rtol=1e-6, atol=1e-6)
    codes, absmax = layer.codes_and_absmax()
    assert torch.equal(join_rows(*split_rows(join_rows(codes, absmax))), layer.weight)


@pytest.mark.parametrize("transport", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.bfloat16()])
def test_copies_and_casts_leave_the_bytes_alone(transport):
    _, layer = make(33, 80, bias=True, threshold=6.0)
    before = layer.weight.clone()
    moved = transport(layer)
    assert torch.equal(moved.weight, before)
    assert moved.threshold == 6.0


def test_an_eval_forward_changes_nothing():
    _, layer = make(40, 96)
    x = torch.randn(3, 96, requires_grad=True)
    first = layer(x)
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.train()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(layer(x), first)


def test_other_rows_are_refused():
    with pytest.raises(ValueError, match="int8"):
        Linear8bit(torch.zeros(3, 9, dtype=torch.uint8), dtype=torch.float32)
