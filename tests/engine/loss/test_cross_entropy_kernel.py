"""The tiled loss with its kernel: taken where it fits, and as near to float64 as torch's operations are."""

import pytest
import torch

from longfit.engine.hf_model import OutputHead
from longfit.engine.loss.linear_cross_entropy import linear_cross_entropy
from longfit.kernels.cpu import elementwise as cpu_elementwise

UNSUPPORTED = cpu_elementwise.supported()
pytestmark = pytest.mark.skipif(UNSUPPORTED is not None, reason=f"C++ elementwise kernels: {UNSUPPORTED}")

# In bf16 the same values are rounded at the same places; in float32 exponentials may have twice torch's roundings.
NOISE = {torch.bfloat16: 1.1, torch.float32: 2**0.5}
TOKENS, WORDS, WIDTH = 37, 211, 24


def loss_and_gradients(dtype, **options):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randn(rows, WIDTH, generator=generator).bfloat16().to(dtype).requires_grad_() for rows in (TOKENS, WORDS)
    )
    labels = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    labels[::5] = -100
    rule = {name: options.pop(name) for name in ("softcap", "scale") if name in options}
    loss = linear_cross_entropy(hidden, OutputHead(weight, **rule), labels, token_tile=16, **options)
    loss.backward()
    return [x.detach().double() for x in (loss, hidden.grad, weight.grad)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_as_near_to_float64_as_torch(monkeypatch, dtype):
    calls = []
    kernel = cpu_elementwise.cross_entropy_
    monkeypatch.setattr(cpu_elementwise, "cross_entropy_", lambda *a, **k: (calls.append(1), kernel(*a, **k))[1])
    got = loss_and_gradients(dtype)
    assert len(calls) == 2  # 29 trained tokens
    monkeypatch.setattr(cpu_elementwise, "supported", lambda: "not now")
    plain = loss_and_gradients(dtype)
    assert len(calls) == 2
    for ours, torchs, truth in zip(got, plain, loss_and_gradients(torch.float64), strict=True):
        # The same roundings of logits and gradients; where one falls otherwise, another draw of the same noise.
        assert (ours - truth).norm() <= NOISE[dtype] * (torchs - truth).norm()


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"scale": 0.5}, {"vocab_tile": 100}])
def test_other_logits_stay_with_torch(monkeypatch, options):
    monkeypatch.setattr(cpu_elementwise, "cross_entropy_", None)
    loss_and_gradients(torch.bfloat16, **options)
    loss_and_gradients(torch.float64)
