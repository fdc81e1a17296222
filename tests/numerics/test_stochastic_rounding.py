"""Stochastic rounding: one of the two neighbours, right on average, the same bits in any order."""

import torch

from longfit.numerics.stochastic_rounding import round_stochastically, rounding_key


def test_the_result_is_one_of_the_two_neighbours() -> None:
    values = torch.randn(10_000) * 10 ** (4 * torch.randn(10_000))
    rounded = round_stochastically(values, key=1)
    down = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)  # towards zero
    up = ((values.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    assert ((rounded.float() == down) | (rounded.float() == up)).all()


def test_what_bfloat16_holds_is_kept() -> None:
    values = torch.randn(1000).bfloat16()
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    assert torch.equal(round_stochastically(values.float(), key=3), values)
    assert torch.equal(round_stochastically(special, key=3).float(), special)
    assert round_stochastically(torch.tensor([float("nan")]), key=3).isnan().all()


def test_the_mean_is_kept() -> None:
    numel = 1 << 18
    value = 1 + 0.3 / 128  # 0.3 of the way from 1 to the next bfloat16
    rounded = round_stochastically(torch.full((numel,), value), key=rounding_key(0, param=0, step=1)).float()
    # Each result is one bfloat16 step (1/128) up with probability 0.3; five standard deviations of the mean.
    assert abs(rounded.mean() - value) < 5 / 128 * (0.3 * 0.7 / numel) ** 0.5


def test_bits_belong_to_the_element_not_to_the_call() -> None:
    values = torch.randn(1000)
    whole = round_stochastically(values, key=9)
    assert torch.equal(whole[300:], round_stochastically(values[300:], key=9, start=300))
    assert torch.equal(whole, round_stochastically(values, key=9, start=1 << 32)), "numbers count modulo 2 ** 32"


def test_keys_tell_seeds_parameters_and_steps_apart() -> None:
    keys = {rounding_key(seed, param=p, step=t) for seed in (0, 1, 1 << 31) for p in range(20) for t in range(1, 20)}
    assert len(keys) == 3 * 20 * 19
    assert all(0 <= key < 1 << 32 for key in keys)


def test_the_hash_never_changes() -> None:
    # A checkpoint goes on with the same roundings only if these stay what they are.
    assert rounding_key(123, param=4, step=5) == 3326343060
    assert round_stochastically(torch.full((8,), 1.002), key=42).tolist() == [1, 1.0078125, 1, 1.0078125, 1, 1, 1, 1]
