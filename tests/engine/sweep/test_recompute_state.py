"""A tile computed again draws the same numbers under the same autocast, and nothing drawn means nothing kept."""

import pytest
import torch

from longfit.engine.sweep.recompute_state import Autocast, RandomState, preserve_random_state

CPU = torch.device("cpu")


def test_a_restored_state_draws_the_same_numbers() -> None:
    noted = RandomState.now(CPU)
    first = torch.rand(7)
    assert not noted.same(RandomState.now(CPU))
    noted.restore(CPU)
    assert noted.same(RandomState.now(CPU))
    assert torch.equal(torch.rand(7), first)


def test_the_random_state_is_as_before_even_after_an_error() -> None:
    def draw_and_fail() -> None:
        with preserve_random_state(CPU):
            torch.rand(3)
            raise ValueError("inside")

    before = RandomState.now(CPU)
    with pytest.raises(ValueError, match="inside"):
        draw_and_fail()
    assert before.same(RandomState.now(CPU))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_entered_again_as_it_was(dtype: torch.dtype) -> None:
    left = torch.randn(3, 5)
    with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
        noted = Autocast.now(CPU)
    outside = Autocast.now(CPU)
    with noted.again():
        assert (left @ left.T).dtype == dtype
        assert not torch.is_autocast_cache_enabled()
        with outside.again():  # off is a setting too
            assert (left @ left.T).dtype == torch.float32
    assert Autocast.now(CPU) == outside
