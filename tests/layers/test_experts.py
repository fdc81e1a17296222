"""Packed experts multiply as dense experts of dq(W) do, forward and backward, whatever the sizes and the routing."""

import pytest
import torch
from torch import Tensor, nn

from longfit.layers.experts import ExpertAdapter, ExpertTokens, PackedExperts, packed_experts, spans_of
from longfit.layers.linear4bit import Linear4bit
from longfit.layers.linear8bit import Linear8bit
from longfit.numerics.row_format import RowFormat

NUM_EXPERTS, RANK = 5, 3
# Experts 1 and 3 have no token; the others one, few and many.
SPANS = (ExpertTokens(0, 0, 1), ExpertTokens(2, 1, 7), ExpertTokens(4, 7, 40))
FORMATS = {
    "whole blocks": RowFormat(24, 64),
    "blocks across rows": RowFormat(20, 36),
    "plain constants": RowFormat(24, 64, double_quant=False),
    "int4, short blocks": RowFormat(16, 96, quant_type="int4", block_size=32),
}


def packed(kind: str, *, transposed: bool) -> tuple[PackedExperts, Tensor, Tensor]:
    """Experts, their bytes, and dq(W) ``[E, rows, columns]`` in float64."""
    if kind == "int8":
        layer = Linear8bit.placeholder(24, 64, dtype=torch.float64, bias=False, device="meta")
    else:
        layer = Linear4bit.placeholder(FORMATS[kind], bias=False, bias_dtype=torch.float64, device="meta")
    experts = PackedExperts({"down_proj": layer}, NUM_EXPERTS, transposed=transposed)
    dense = torch.randn(NUM_EXPERTS, layer.out_features, layer.in_features, dtype=torch.float64)
    rows, constants = experts.stored("down_proj", dense)
    experts.down_proj_constants = constants
    return experts, rows, experts.dequantize("down_proj", rows, torch.float64)


def reference(x: Tensor, weight: Tensor, adapter: ExpertAdapter | None, *, transposed: bool) -> Tensor:
    """Each span by its expert's dense matrix; PEFT's shapes of A and B taken apart by index."""
    matrices = weight.transpose(1, 2) if transposed else weight
    y = torch.zeros(len(x), matrices.shape[1], dtype=x.dtype)
    for expert, start, stop in SPANS:
        matrix = matrices[expert]
        if adapter is not None:
            A = adapter.A.view(NUM_EXPERTS, RANK, -1)[expert]
            B = adapter.B.view(-1, RANK, NUM_EXPERTS)[:, :, expert]
            matrix = matrix + adapter.scaling * B @ A
        y = torch.cat([y[:start], x[start:stop] @ matrix.t(), y[stop:]])
    return y


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", [*FORMATS, "int8"])
@pytest.mark.parametrize("adapted", [False, True])
def test_products_equal_those_of_the_dequantised_weight(kind: str, transposed: bool, adapted: bool) -> None:
    experts, rows, dense = packed(kind, transposed=transposed)
    width, out = experts.in_out("down_proj")
    x = torch.randn(SPANS[-1].stop, width, dtype=torch.float64, requires_grad=True)
    adapter = None
    if adapted:
        A = torch.randn(NUM_EXPERTS * RANK, width, dtype=torch.float64, requires_grad=True)
        B = torch.randn(out, RANK * NUM_EXPERTS, dtype=torch.float64, requires_grad=True)
        adapter = experts.adapters["down_proj"] = ExpertAdapter(A, B, 0.7)
    leaves = [x] if adapter is None else [x, adapter.A, adapter.B]
    got, expected = experts.multiply("down_proj", x, rows, SPANS), reference(x, dense, adapter, transposed=transposed)
    # Sums of at most 96 + 3 products of numbers near 1, in another order: 99 x 2**-53 x the size of the sum.
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(got, expected, **close)
    upstream = torch.randn_like(got)
    gradients = [torch.autograd.grad(y, leaves, upstream) for y in (got, expected)]
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain, **close)


def test_experts_are_quantised_each_by_itself() -> None:
    experts, rows, _ = packed("whole blocks", transposed=False)
    dense = torch.randn(NUM_EXPERTS, 24, 64)
    rows, constants = experts.stored("down_proj", dense)
    for number, weight in enumerate(dense):
        linear = nn.Linear(64, 24, bias=False)
        linear.weight.data = weight
        alone = Linear4bit.from_linear(linear)
        assert torch.equal(alone.weight, rows[number])
        assert torch.equal(alone.constants, constants[number])


def test_tokens_of_no_expert_come_out_as_zeros() -> None:
    experts, rows, _ = packed("whole blocks", transposed=False)
    ids = torch.tensor([0, 0, 3, NUM_EXPERTS, NUM_EXPERTS + 2])
    spans = spans_of(ids, NUM_EXPERTS)
    assert spans == (ExpertTokens(0, 0, 2), ExpertTokens(3, 2, 3))
    y = experts.multiply("down_proj", torch.randn(5, 64), rows, spans)
    assert bool((y[:3] != 0).any(1).all())
    assert not y[3:].any()


def test_only_the_experts_asked_for_are_read() -> None:
    experts, rows, dense = packed("plain constants", transposed=False)
    rows[1] = rows[3] = 0xFF  # as constants these bytes are NaN
    x = torch.randn(SPANS[-1].stop, 64, dtype=torch.float64)
    y = experts.multiply("down_proj", x, rows, SPANS)
    torch.testing.assert_close(y, reference(x, dense, None, transposed=False), rtol=0, atol=1e-12)
    assert not experts.constants_finite("down_proj", rows)


def test_a_module_without_packed_experts_has_none() -> None:
    assert packed_experts(nn.Linear(2, 2)) is None
