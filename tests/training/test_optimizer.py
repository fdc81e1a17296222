"""Which optimiser a config makes, what decays, and clipping."""

from pathlib import Path

import pytest
import torch
from torch import nn

from longfit.config import RunConfig
from longfit.errors import PagingError
from longfit.optim.adamw import PagedAdamW
from longfit.optim.page_file import PageFile
from longfit.training.optimizer import PagingMeter, clip_gradients, make_optimizer, parameter_groups, relieve


def config(**settings: object) -> RunConfig:
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return RunConfig.of({"model.name": "base", "data.path": "texts", **given})


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    module = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)
    module[2].requires_grad_(False)
    return module


def test_only_matrices_decay_and_frozen_parameters_stay_out() -> None:
    module = model()
    matrices, vectors = parameter_groups(module, weight_decay=0.1)
    assert matrices["weight_decay"] == 0.1
    assert [p.shape for p in matrices["params"]] == [(4, 8)]
    assert vectors["weight_decay"] == 0.0
    assert len(vectors["params"]) == 3


def test_the_optimiser_fits_dtype_and_settings(tmp_path: Path) -> None:
    def made(dtype: torch.dtype, *, process: int | None = None, **settings: object) -> torch.optim.Optimizer:
        groups = parameter_groups(model(dtype), weight_decay=0.0)
        return make_optimizer(config(**settings), groups, run_id="mine", process=process)

    plain = made(torch.float32, optim__betas=[0.8, 0.95], train__learning_rate=3e-3)
    assert type(plain) is type(made(torch.bfloat16)) is PagedAdamW
    assert (plain.defaults["betas"], plain.defaults["lr"]) == ((0.8, 0.95), 3e-3)
    assert (plain.state_bits, plain.budget_bytes) == (32, None)
    assert relieve(plain, lambda: 0.5) == 0.5
    of_torch = torch.optim.AdamW(parameter_groups(model(), weight_decay=0.0))
    assert PagingMeter(of_torch).read() == {}
    assert relieve(of_torch, lambda: 0.5) == 0.5
    small = made(torch.float32, optim__optim="adamw8bit", optim__budget="64MiB", optim__file=str(tmp_path / "state"))
    assert isinstance(small, PagedAdamW)
    assert (small.state_bits, small.budget_bytes) == (8, 64 << 20)
    assert PagingMeter(small).read()["optim_paged_bytes"] == 0
    assert (tmp_path / "state").exists()
    other = made(torch.float32, process=1, optim__budget="64MiB", optim__file=str(tmp_path / "state"))
    assert isinstance(other, PagedAdamW)
    other.commit()
    del other  # closes the file
    with pytest.raises(PagingError, match=r"run 'mine\.1'; this is run 'mine'"):
        PageFile(tmp_path / "state.1", run="mine", page_bytes=4 << 20)


@pytest.mark.parametrize("part", [1 << 22, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_clipping_scales_to_the_norm_and_never_up(
    dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longfit.training.optimizer.NORM_PART", part)
    parameters = [torch.zeros(30, 7, dtype=dtype), torch.zeros(5, dtype=torch.float32), torch.zeros(3)]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in parameters[:2]]
    expected = sum(gradient.double().square().sum() for gradient in before) ** 0.5
    # float32 sums of 210 squares: relative error below 210 * 2^-24
    assert clip_gradients(parameters, 100.0) == pytest.approx(float(expected), rel=2e-5)
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(parameters, before, strict=False))
    clip_gradients(parameters, 1.0)
    after = sum(parameter.grad.double().square().sum() for parameter in parameters[:2]) ** 0.5
    # each bfloat16 gradient is rounded to 8 bits; the norm of the rounding is below 2^-8 of the norm
    assert float(after) == pytest.approx(1.0, abs=2**-8)
    assert clip_gradients([torch.zeros(2)], 1.0) == 0.0
