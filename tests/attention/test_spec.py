"""What a layer asks of its attention, as a schedule of the whole sequence."""

import torch

from longfit.attention.spec import AttentionSpec
from longfit.attention.visibility import build_schedule, document_starts

CPU = torch.device("cpu")
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])


def test_a_spec_stands_for_the_schedule_of_its_documents_groups_and_window() -> None:
    for rules in ({}, {"group_size": 4}, {"sliding_window": 3}):
        spec = AttentionSpec(0.5, position_ids=POSITIONS, **rules)
        expected = build_schedule(6, document_starts(2, 8, position_ids=POSITIONS), **rules)
        found = spec.schedule(2, 6, 8, CPU)
        assert torch.equal(found.first_key, expected.first_key)
        assert found.head_bounds == expected.head_bounds


def test_one_document_forgets_where_documents_begin_and_keeps_padding() -> None:
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    spec = AttentionSpec(0.5, position_ids=POSITIONS, attention_mask=padding).one_document()
    assert spec.schedule(1, 1, 8, CPU).first_key.flatten().tolist() == [0, 0, 2, 2, 2, 2, 2, 2]


def test_other_positions_cut_elsewhere() -> None:
    spec = AttentionSpec(0.5, position_ids=POSITIONS).with_positions(torch.arange(8)[None])
    assert not spec.schedule(1, 1, 8, CPU).first_key.any()
