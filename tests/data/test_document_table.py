"""The table says of each document what the document says itself; parts of documents are counted as they are."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from longfit.data.document_table import DocumentTable, count_targets
from longfit.data.tokenized import TokenizedDocument


@st.composite
def documents(draw: st.DrawFn) -> TokenizedDocument:
    length = draw(st.integers(0, 12))
    ids = np.asarray(draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)), dtype=np.int32)
    mask = draw(st.none() | st.lists(st.booleans(), min_size=length, max_size=length))
    return TokenizedDocument("d", ids, None if mask is None else np.asarray(mask, dtype=bool), num_special=length % 3)


@given(found=st.lists(documents(), max_size=8), cut=st.integers(0, 11))
@settings(max_examples=200, deadline=None)
def test_what_the_table_says_is_so(found: list[TokenizedDocument], cut: int) -> None:
    table = DocumentTable.of(found)
    ends = [not d.is_chat and not (len(d.input_ids) and d.input_ids[-1] == 0) for d in found]
    assert table.lengths(eos_token_id=0).tolist() == [len(d.input_ids) + e for d, e in zip(found, ends, strict=True)]
    assert table.lengths(eos_token_id=None).tolist() == [len(d.input_ids) for d in found]
    assert table.num_special.tolist() == [d.num_special for d in found]
    for whole in (True, False):
        pieces = [
            (index, 0 if whole else min(cut, len(d.input_ids) - 1), len(d.input_ids))
            for index, d in enumerate(found)
            if len(d.input_ids)
        ]
        targets, first = count_targets(found, table, *np.asarray(pieces, dtype=np.int64).reshape(-1, 3).T)
        for (index, start, stop), counted, begins in zip(pieces, targets, first, strict=True):
            trained = found[index].trained
            mask = np.ones(stop, dtype=bool) if trained is None else trained
            assert (counted, begins) == (mask[start + 1 : stop].sum(), mask[start])
