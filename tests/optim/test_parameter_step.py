"""A step on runs of elements, of contiguous parameters and of strided ones, is torch's step on the whole."""

import pytest
import torch

from longfit.numerics.adamw import AdamwState
from longfit.optim.page_layout import PageLayout, format_of
from longfit.optim.parameter_step import ParameterStep, scalars_of, step_runs

GROUP = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("strided", [False, True])
def test_runs_of_elements_step_as_the_whole_parameter_does(strided: bool) -> None:
    torch.manual_seed(0)
    param = torch.randn(300, 200).t() if strided else torch.randn(200, 300)
    grad, expected = torch.randn_like(param), param.clone().contiguous().requires_grad_()
    layout = PageLayout(65_536)  # a page holds a part of the parameter's 480,000 bytes of moments
    layout.add([(0, param, format_of(param, state_bits=32, master_weights="fp32"))])
    states: list[tuple[object, AdamwState]] = []
    for page in layout.pages:
        frame = torch.zeros(layout.page_bytes, dtype=torch.uint8)
        states += [(run, run.state(frame)) for run in page.runs]
    assert len(states) > 1
    step_runs(states, {0: ParameterStep(param, grad, scalars_of(GROUP, 1), 0)})
    expected.grad = grad.clone().contiguous()
    torch.optim.AdamW([expected], **GROUP).step()
    # the same few float32 operations in another order: some units in the last place of values of up to 5
    torch.testing.assert_close(param, expected.detach(), rtol=0, atol=16 * 2.0**-22)
