"""Logits made in shared buffers have the bits of fresh ones, whatever lay there before."""

import pytest
import torch
import torch.nn.functional as F

from longfit.engine.loss.logits import LogitsBuffers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_logits_are_those_of_a_linear_map(dtype: torch.dtype, with_bias: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 48).to(dtype), torch.randn(130, 48).to(dtype)
    bias = torch.randn(130).to(dtype) if with_bias else None
    buffers = LogitsBuffers(hidden, num_logits=5 * 130, dtype=dtype, sum_dtype=torch.float32)
    buffers.logits(hidden, weight, bias).fill_(torch.nan)
    for rows in (5, 1):  # the last tile is shorter
        logits = buffers.logits(hidden[:rows], weight, bias)
        assert torch.equal(logits, F.linear(hidden[:rows], weight, bias).float())
        expected = logits.mul_(0.37).to(dtype)
        assert torch.equal(buffers.narrowed(logits), expected)


def test_one_dtype_needs_one_buffers() -> None:
    hidden = torch.randn(3, 8)
    buffers = LogitsBuffers(hidden, num_logits=30, dtype=torch.float32, sum_dtype=torch.float32)
    logits = buffers.logits(hidden, torch.randn(10, 8), None)
    assert buffers.narrowed(logits).data_ptr() == logits.data_ptr()
