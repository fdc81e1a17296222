"""Attention on the meta device: shapes and dtypes of a kernel's results, whatever is forced."""

import pytest
import torch

from longfit.attention.backends import tile_backward, tile_forward
from longfit.attention.spec import AttentionSpec
from longfit.attention.tile import QueryTile
from longfit.kernels.dispatch import use_backend

META = torch.device("meta")


@pytest.mark.parametrize(("dtype", "sums"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("forced", [None, "reference"])
def test_results_look_like_those_of_the_reference(dtype, sums, forced):
    spec = AttentionSpec(scaling=0.5, softcap=30.0, group_size=4, sinks=torch.empty(6, dtype=dtype, device=META))
    schedule = spec.schedule(2, 6, 20, META)
    q = torch.empty(2, 6, 7, 8, dtype=dtype, device=META)
    k, v = (torch.empty(2, 3, 20, size, dtype=dtype, device=META) for size in (8, 5))
    tile = QueryTile(q, k, v, schedule, 13, spec.scaling, spec.softcap, spec.sinks)
    with use_backend(forced, op="attention"):
        out, lse = tile_forward(tile)
        grad_k, grad_v = (torch.empty(x.shape, dtype=sums, device=META) for x in (k, v))
        grad_q = tile_backward(tile, torch.empty_like(out), out, lse, grad_k=grad_k, grad_v=grad_v)
    assert (out.device, out.dtype, out.shape) == (META, dtype, (2, 6, 7, 5))
    assert (lse.device, lse.dtype, lse.shape) == (META, sums, (2, 6, 7))
    assert (grad_q.device, grad_q.dtype, grad_q.shape) == (META, dtype, q.shape)


def test_a_row_is_one_document_where_positions_have_no_values():
    positions = torch.empty(1, 20, dtype=torch.int64, device=META)
    spec = AttentionSpec(scaling=1.0, position_ids=positions, sliding_window=6)
    assert spec.schedule(2, 4, 20, META).first_key.tolist() == [[[max(0, t - 5) for t in range(20)]] * 2]
