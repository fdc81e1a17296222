"""Rotary scaling against the formulas of the papers and against transformers' own tables."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longfit.numerics import rope

# transformers computes powers in float32: pow(theta, x) carries a relative error of a few ulp (6e-8 each).
FLOAT32_POW = {"rtol": 1e-6, "atol": 0.0}

SHAPES = [(64, 10_000.0, 4096), (64, 100_000.0, 8192), (128, 500_000.0, 8192), (8, 10_000.0, 128), (80, 1e6, 32_768)]


def transformers_table(
    rope_type: str, dim: int, theta: float, native: int, factor: float
) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        max_position_embeddings=int(native * factor),
        rope_parameters={
            "rope_type": rope_type,
            "rope_theta": theta,
            "factor": factor,
            **({"original_max_position_embeddings": native} if rope_type == "yarn" else {}),
        },
    )
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))


@pytest.mark.parametrize(("dim", "theta", "native"), SHAPES)
@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 16.0])
def test_linear_and_yarn_equal_transformers(dim: int, theta: float, native: int, factor: float) -> None:
    for name, ours in {
        "linear": rope.linear(dim, theta, factor=factor),
        "yarn": rope.yarn(dim, theta, factor=factor, native_context=native),
    }.items():
        inv_freq, attention_factor = transformers_table(name, dim, theta, native, factor)
        torch.testing.assert_close(ours.inv_freq, inv_freq, **FLOAT32_POW)
        assert ours.attention_factor == pytest.approx(attention_factor, rel=1e-12)
        assert ours.inv_freq.dtype == torch.float32


def test_ntk_equals_transformers_dynamic_at_its_end() -> None:
    # At n tokens beyond a maximum of m, the dynamic rule is the NTK-aware one with factor * n / m - (factor - 1).
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 3.0},
    )
    inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=4096)
    torch.testing.assert_close(rope.ntk(64, 10_000.0, factor=3.0 * 4 - 2).inv_freq, inv_freq, **FLOAT32_POW)


@pytest.mark.parametrize(("dim", "theta", "native"), SHAPES)
def test_properties(dim: int, theta: float, native: int) -> None:
    plain, factor = rope.inverse_frequencies(dim, theta), 4.0
    ntk = rope.ntk(dim, theta, factor=factor).inv_freq
    yarn = rope.yarn(dim, theta, factor=factor, native_context=native)
    assert plain[0] == 1
    assert (plain.diff() < 0).all()
    assert ntk[0] == 1  # the fastest pair is kept, the slowest interpolated
    torch.testing.assert_close(ntk[-1], plain[-1] / factor, **FLOAT32_POW)
    turns = native * plain / (2 * math.pi)
    ratio = plain / yarn.inv_freq
    assert ratio.min() >= 1 - 1e-6
    assert ratio.max() <= factor + 1e-6
    assert (ratio.diff() >= -1e-6).all()
    # The ends of the ramp are rounded outwards by up to one pair, hence the strictest pairs only.
    assert ratio[turns > 32 * theta ** (2 / dim)] == pytest.approx(1.0, rel=1e-6)
    assert ratio[turns < theta ** (-2 / dim)] == pytest.approx(factor, rel=1e-6)
    for unscaled in (rope.linear(dim, theta, factor=1), rope.ntk(dim, theta, factor=1)):
        assert torch.equal(unscaled.inv_freq, plain)


def test_extending_twice_is_extending_once() -> None:
    twice = rope.ntk_theta(64, rope.ntk_theta(64, 1e4, factor=2), factor=3)
    assert twice == pytest.approx(rope.ntk_theta(64, 1e4, factor=6), rel=1e-12)
    middle = rope.context_theta(1e4, native_context=4096, context=10_000)
    twice = rope.context_theta(middle, native_context=10_000, context=65_536)
    assert twice == pytest.approx(rope.context_theta(1e4, native_context=4096, context=65_536), rel=1e-12)


def test_context_theta_keeps_the_number_of_fully_turned_pairs() -> None:
    native, context, dim = 4096, 32_768, 128
    theta = rope.context_theta(10_000.0, native_context=native, context=context)
    before = (native * rope.inverse_frequencies(dim, 10_000.0) >= 2 * math.pi).sum()
    after = (context * rope.inverse_frequencies(dim, theta) >= 2 * math.pi).sum()
    assert before == after


@pytest.mark.parametrize(
    "call",
    [
        lambda: rope.inverse_frequencies(7, 1e4),
        lambda: rope.inverse_frequencies(8, 1.0),
        lambda: rope.linear(8, 1e4, factor=0.5),
        lambda: rope.ntk(2, 1e4, factor=2.0),
        lambda: rope.yarn(8, 1e4, factor=float("nan"), native_context=128),
        lambda: rope.context_theta(1e4, native_context=4096, context=2048),
    ],
)
def test_errors(call) -> None:
    with pytest.raises(ValueError, match=r"must be|needs at least"):
        call()
