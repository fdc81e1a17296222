"""How torch's CPU attention is cut into calls."""

from itertools import pairwise

from tests.attention.backends.test_backends import SCHEDULES

from longfit.attention.backends import torch_cpu
from longfit.attention.visibility import build_schedule, document_starts


def test_pieces_cover_every_query_once_and_stay_small() -> None:
    for settings in SCHEDULES.values():
        for tokens, start in ((130, 0), (700, 33), (1, 5)):
            schedule = build_schedule(4, document_starts(1, start + tokens), **settings)
            for first_key in schedule.tile(start, tokens)[:, 0]:
                pieces = list(torch_cpu.pieces(first_key, start))
                assert [pieces[0].low, *(piece.high for piece in pieces)][-1] == start + tokens
                assert all(a.high == b.low for a, b in pairwise(pieces))
                for piece in pieces:
                    masked = [part for part in piece.parts if part.visible == "mask"]
                    assert not masked or piece.high - piece.low <= torch_cpu.MASK_BLOCK
