"""float16: the scale's rules, and runs that need it, overflow and resume."""

import os
import signal
from pathlib import Path

import pytest
import torch
from tests.training.conftest import MakeConfig
from tests.training.tiny import read_losses

from longfit.optim.adamw import PagedAdamW
from longfit.training import loss_scale
from longfit.training.checkpoint import read_state
from longfit.training.loop import train
from longfit.training.metrics import Event
from longfit.training.optimizer import clip_gradients

FLOAT16 = {"model__dtype": "float16", "adapter__train_norms": True, "engine__engine": "sweep", "train__steps": 4}


def test_the_scale_falls_to_two_and_grows_at_fixed_steps() -> None:
    assert [loss_scale.first_scale(dtype) for dtype in (torch.float16, torch.bfloat16)] == [65536.0, 1.0]
    scales = [65536.0]
    while smaller := loss_scale.after_overflow(scales[-1]):
        scales.append(smaller)
    assert scales[-1] == 2.0
    assert loss_scale.after_overflow(1.0) is None
    growth = loss_scale.GROWTH_STEPS
    assert [loss_scale.after_step(8.0, step) for step in (growth - 1, growth, growth + 1)] == [8.0, 16.0, 8.0]
    assert loss_scale.after_step(loss_scale.LARGEST, growth) == loss_scale.LARGEST
    assert loss_scale.after_step(1.0, growth) == 1.0, "other dtypes stay unscaled"


def test_clipping_takes_the_scale_out() -> None:
    plain, scaled = torch.zeros(9), torch.zeros(9)
    plain.grad = torch.randn(9)
    scaled.grad = plain.grad * 1024
    for max_norm in (100.0, 0.5):  # a power of two in and out: exact, but for the one rounding of the factor
        assert clip_gradients([scaled], max_norm, scale=1024.0) == pytest.approx(clip_gradients([plain], max_norm))
        torch.testing.assert_close(scaled.grad, plain.grad, rtol=2**-22, atol=0)
        scaled.grad *= 1024
    scaled.grad[3] = float("inf")
    assert clip_gradients([scaled], 0.5, scale=1024.0) == float("inf")


def test_small_float16_gradients_survive_the_scale_and_its_taking_out() -> None:
    """1e-9, a norm's gradient in a long context, is nothing in float16; scaled it is, and float32 when it is small."""
    weight, plain = (torch.ones(9, dtype=torch.float16, requires_grad=True) for _ in range(2))
    x = torch.full((9,), 2.0**-30, dtype=torch.float32)
    (plain.float() * x).sum().backward()
    assert plain.grad is not None
    assert not plain.grad.any(), "underflows by itself"
    for num_processes in (1, 2):
        loss_scale.begin([weight], num_processes=num_processes)
        for _ in range(2):
            ((weight.float() * x).sum() * 2.0**16).backward()
        assert weight.grad is not None
        assert weight.grad.dtype == (torch.float32 if num_processes == 1 else torch.float16)
        assert clip_gradients([weight], 1.0, scale=2.0**16) == pytest.approx(3 * 2.0**-29)
        assert torch.equal(weight.grad, torch.full((9,), 2.0**-29))
    optimizer = PagedAdamW([weight], lr=1e-2)
    optimizer.step()
    assert bool((weight < 1).all()), "learned"


def test_norms_of_a_float16_run_collect_float32_gradients(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over micro-batches and tiles; only a layer that is differentiated at once rounds a share to float16."""
    seen: list[tuple[torch.dtype, torch.dtype | None, bool]] = []

    def watched(parameters: list[torch.Tensor], *args: float, **options: float) -> float:
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            seen.append((parameter.dtype, gradient.dtype, torch.equal(gradient, gradient.half().float())))
        return clip_gradients(parameters, *args, **options)

    monkeypatch.setattr("longfit.training.step.clip_gradients", watched)
    train(make_config(**FLOAT16 | {"train__steps": 1}, engine__tile=16, train__gradient_accumulation=2))
    norms = [(dtype, rounded) for parameter, dtype, rounded in seen if parameter == torch.float16]
    assert len(norms) == 5
    assert {dtype for dtype, _ in norms} == {torch.float32}
    assert sum(rounded for _, rounded in norms) == 0


def test_a_float16_run_says_so_and_learns_what_a_float32_run_learns(make_config: MakeConfig, tmp_path: Path) -> None:
    events: list[Event] = []
    train(make_config(**FLOAT16, output__run_dir=str(tmp_path / "half")), on_event=events.append)
    assert any(event.kind == "warning" and "float16 (as model.dtype asks)" in event.text for event in events)
    train(make_config(**FLOAT16 | {"model__dtype": "float32"}, output__run_dir=str(tmp_path / "single")))
    # Logits of size 1 from 11 bits: losses agree to some 2^-10 in the first steps.
    assert read_losses(tmp_path / "half") == pytest.approx(read_losses(tmp_path / "single"), abs=4e-3)


def test_gradients_that_overflow_are_made_again(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, first: float) -> tuple[Path, list[str]]:
        monkeypatch.setattr(loss_scale, "FIRST", first)
        texts: list[str] = []
        result = train(
            make_config(**FLOAT16, output__run_dir=str(tmp_path / name)), on_event=lambda e: texts.append(e.text)
        )
        assert result.finished
        return result.checkpoint, texts

    checkpoint, texts = run("high", 2.0**40)
    again = [text for text in texts if "again at" in text]
    assert again, "2 ** 40 overflows"
    scale = read_state(checkpoint).loss_scale
    assert scale == 2.0 ** (40 - len(again))
    run("right", scale)
    assert read_losses(tmp_path / "high") == read_losses(tmp_path / "right"), "no window was skipped"


def test_the_scale_is_kept_when_a_run_resumes(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "step" and event.values["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loss_scale, "FIRST", 2.0**36)
    unbroken = train(make_config(**FLOAT16, output__run_dir=str(tmp_path / "unbroken")))
    config = make_config(**FLOAT16)
    assert not train(config, on_event=interrupt).finished
    texts: list[str] = []
    train(config, resume=True, on_event=lambda event: texts.append(event.text))
    assert not any("again at" in text for text in texts)
    assert read_losses(tmp_path / "run") == read_losses(unbroken.run_dir)
