"""Which backend computes norms, gated products and the loss: chosen by dtype and processor, or forced."""

import pytest
import torch

from longfit.errors import BackendError
from longfit.kernels import elementwise
from longfit.kernels.dispatch import use_backend

CPU = elementwise.why_not("cpu", "cpu", torch.bfloat16)


def test_the_reference_can_be_forced() -> None:
    x = torch.randn(4, 8).bfloat16()
    assert elementwise.runs_kernel("rms_norm", x) == (CPU is None)
    with use_backend("reference", op="rms_norm"):
        assert not elementwise.runs_kernel("rms_norm", x)
        assert elementwise.runs_kernel("swiglu", x) == (CPU is None)


def test_a_forced_kernel_that_does_not_take_a_call_raises() -> None:
    with (
        use_backend("cpu", op="cross_entropy"),
        pytest.raises(BackendError, match="cross_entropy with the backend 'cpu'"),
    ):
        elementwise.runs_kernel("cross_entropy", torch.randn(4, 8).double())


def test_each_choice_has_its_reason() -> None:
    found = elementwise.choice("rotary", "cpu", torch.float32)
    assert found.backend == "reference"
    assert "not liger: liger-kernel" in found.reason
    assert "it runs on the CPU, not on cuda" in elementwise.choice("cross_entropy", "cuda", torch.bfloat16).reason
