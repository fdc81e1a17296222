"""A tile of queries: what does not fit is refused where it is made."""

import pytest
from tests.attention.dense_attention import random_tensors

from longfit.attention.tile import QueryTile
from longfit.attention.visibility import build_schedule, document_starts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, s: (q[:, :3], k, v, s, 0), "multiple of key/value heads"),
        (lambda q, k, v, s: (q, k[:, :, :4], v[:, :, :4], s, 0), "cover the last query"),
        (lambda q, k, v, s: (q, k, v, s, 1), "cover the last query"),
        (lambda q, k, v, s: (q, k.float(), v, s, 0), "one dtype"),
        (lambda q, k, v, s: (q[0], k, v, s, 0), r"must be \[B, H, t, D\]"),
        (lambda q, k, v, s: (q[:1], k[:1], v[:1], s, 0), "schedule of 2 rows"),
        (lambda q, k, v, s: (q[:, :2], k, v, s, 0), "4 heads does not fit"),
    ],
)
def test_shapes_that_do_not_fit(change, message: str) -> None:
    (q, k, v), _ = random_tensors(4, 2, 8)
    q, k, v, schedule, start = change(q, k, v, build_schedule(4, document_starts(2, 8)))
    with pytest.raises(ValueError, match=message):
        QueryTile(q, k, v, schedule, start, 1.0)
