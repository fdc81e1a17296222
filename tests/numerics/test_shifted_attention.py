"""S2-Attn against the paper's roll with its wrapped halves masked apart, and what the roll alone gets wrong."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longfit.numerics import shifted_attention as s2

ROUNDING = {"rtol": 0.0, "atol": 1e-12}  # float64, sums of at most a few hundred terms of order one


def one_document(batch: int, tokens: int) -> torch.Tensor:
    return torch.zeros(batch, tokens, dtype=torch.int64)


def rolled_attention(q, k, v, group_size: int, *, masked: bool) -> torch.Tensor:
    """The paper's algorithm 1: roll half of the heads, attend causally within groups, roll back."""
    batch, heads, tokens, dim = q.shape
    half, shift = heads // 2, group_size // 2

    def to_groups(x):
        x = torch.cat([x[:, :half], x[:, half:].roll(-shift, 2)], 1)
        return x.view(batch, heads, tokens // group_size, group_size, dim)

    visible = torch.ones(group_size, group_size, dtype=torch.bool).tril()
    visible = visible.expand(heads, tokens // group_size, group_size, group_size).clone()
    if masked:
        visible[half:, -1, shift:, :shift] = False  # the wrapped group: the text's beginning must not see its end
    scores = to_groups(q) @ to_groups(k).transpose(-1, -2) * dim**-0.5
    out = (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ to_groups(v)).view(q.shape)
    return torch.cat([out[:, :half], out[:, half:].roll(shift, 2)], 1)


def test_equals_the_roll_with_the_wrap_masked_and_the_plain_roll_leaks() -> None:
    q, k, v = torch.randn(3, 2, 4, 64, 8, dtype=torch.float64)
    ours = s2.dense_attention(q, k, v, s2.mask(4, one_document(2, 64), group_size=16))
    torch.testing.assert_close(ours, rolled_attention(q, k, v, 16, masked=True), **ROUNDING)
    leaking = rolled_attention(q, k, v, 16, masked=False)
    wrong = (leaking - ours).abs().amax((0, 3)) > 1e-6  # [H, T]
    assert wrong[2:, :8].all()  # the first half group, of the shifted heads
    assert not wrong[2:, 8:].any()
    assert not wrong[:2].any()


@given(
    tokens=st.integers(1, 70),
    half=st.integers(1, 20),
    heads=st.integers(1, 9),
    cut=st.integers(0, 69),
)
def test_mask_is_the_definition_token_by_token(tokens: int, half: int, heads: int, cut: int) -> None:
    group, cut = 2 * half, min(cut, tokens - 1)
    start = one_document(1, tokens)
    start[:, cut:] = cut
    visible = s2.mask(heads, start, group_size=group)[0]
    for head in {0, heads // 2, heads - 1}:
        shift = half if head >= heads // 2 else 0
        for t in {0, cut, tokens // 2, tokens - 1}:
            origin = int(start[0, t])
            expected = [
                j <= t and j >= origin and (j - origin + shift) // group == (t - origin + shift) // group
                for j in range(tokens)
            ]
            assert visible[head, t].tolist() == expected
            first = int(s2.first_key(start, group_size=group, shift=shift)[0, t])
            assert expected == [first <= j <= t for j in range(tokens)]  # one contiguous range


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (9, 3), (8, 1), (1, 1)])
def test_no_token_reads_the_future_and_documents_stay_apart(heads: int, kv_heads: int) -> None:
    tokens, cut = 75, 30
    start = one_document(1, tokens)
    start[:, cut:] = cut
    visible = s2.mask(heads, start, group_size=16)
    q = torch.randn(1, heads, tokens, 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, kv_heads, tokens, 8, dtype=torch.float64)
    clean = s2.dense_attention(q, k, v, visible)
    for t in (0, 7, 8, 29, 30, 37, 38, 74):
        x, y, z = q.clone(), k.clone(), v.clone()
        x[:, :, t], y[:, :, t], z[:, :, t] = 100.0, 100.0, 100.0
        touched = (s2.dense_attention(x, y, z, visible) != clean).any(-1).any(1)[0].nonzero().flatten()
        assert touched[0] == t  # itself, and nothing before
        assert t >= cut or touched[-1] < cut


def test_receptive_field_is_reached_and_not_exceeded() -> None:
    layers, group, tokens = 3, 8, 64
    start = one_document(1, tokens)
    visible = s2.mask(2, start, group_size=group).any(1)[0].double()  # what either half of the heads sees
    reachable = torch.linalg.matrix_power(visible, layers) > 0
    spans = [t - int(row.nonzero()[0]) + 1 for t, row in enumerate(reachable)]
    assert max(spans) == s2.receptive_field(layers, group) == 16


def test_softcap_and_group_errors() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64) * 10
    visible = s2.mask(2, one_document(1, 5))
    capped = s2.dense_attention(q, k, v, visible, scaling=1.0, softcap=0.5)
    scores = 0.5 * torch.tanh(q @ k.mT / 0.5)
    expected = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(capped, expected, **ROUNDING)
    for size in (7, 0, -2):
        with pytest.raises(ValueError, match="even number of tokens"):
            s2.group_ids(torch.arange(4), group_size=size)
        with pytest.raises(ValueError, match="even number of tokens"):
            s2.mask(2, one_document(1, 5), group_size=size)


def test_the_picture_of_the_explanation_has_the_borders_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "explanation" / "shifted-attention.md").read_text(encoding="utf-8")
    scale, first, second = (
        next(line for line in page.splitlines() if line.startswith(begin))
        for begin in ("                          |", "first half of the heads ", "second half  ")
    )
    marks = [place for place, letter in enumerate(scale) if letter == "|"]  # a mark each 1,024 tokens
    for line, shift in ((first, 0), (second, 1024)):
        drawn = [marks.index(place) * 1024 for place, letter in enumerate(line) if letter == "|"]
        groups = s2.group_ids(torch.arange(8192), group_size=2048, shift=shift)
        assert drawn == (groups.diff().nonzero().flatten() + 1).tolist()
