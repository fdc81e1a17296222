"""Windows: every document whole where it fits, no target across documents, the same order on every machine."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longfit.data.packing import TokenizedDocument, pack
from longfit.errors import ConfigError, DataError
from longfit.numerics.labels import IGNORED

EOS = 0


def texts(*lengths: int) -> list[TokenizedDocument]:
    """Documents whose token ids are unique over the set, so that any token can be traced."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    return [TokenizedDocument(f"d{i}", part) for i, part in enumerate(np.split(ids, np.cumsum(lengths)[:-1]))]


def chat(prompt: int, answer: int, *, name: str = "chat", first: int = 1) -> TokenizedDocument:
    ids = np.arange(first, first + prompt + answer, dtype=np.int32)
    return TokenizedDocument(name, ids, np.arange(prompt + answer) >= prompt)


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=25), context=st.integers(2, 33), seed=st.integers(0, 3)
)
@settings(max_examples=150, deadline=None)
def test_windows_hold_every_token_once_and_targets_stay_inside_their_document(
    lengths: list[int], context: int, seed: int
) -> None:
    documents = texts(*lengths)
    packed = pack(documents, context=context, eos_token_id=EOS, seed=seed)
    owner = {int(token): index for index, document in enumerate(documents) for token in document.input_ids}
    seen: list[int] = []
    ends = 0
    for window in (packed[i] for i in range(len(packed))):
        ids, positions, labels = (window[key].tolist() for key in ("input_ids", "position_ids", "labels"))
        assert len(ids) == len(positions) == len(labels) <= context
        assert all(tensor.dtype == torch.int64 for tensor in window.values())
        for t, (token, position, label) in enumerate(zip(ids, positions, labels, strict=True)):
            if position == 0:
                assert label == IGNORED  # a piece's first token has nothing before it
                continue
            assert position == positions[t - 1] + 1
            assert label == token
            if token == EOS:
                ends += 1
            else:
                assert owner[token] == owner[ids[t - 1]]
                assert token == ids[t - 1] + 1
        seen += [token for token in ids if token != EOS]
    assert len(set(seen)) == len(seen)
    # Left out are only single tokens, which no one could predict: the last of a document that ends one past a window.
    with_end = [length + 1 for length in lengths]
    missing = sum(length % context == 1 for length in with_end)
    assert len(seen) + ends == sum(with_end) - missing


def test_documents_that_fit_stay_whole_and_fill_windows_well() -> None:
    packed = pack(
        texts(*[59] * 3, *[19] * 3, 39, 39), context=80, eos_token_id=EOS
    )  # 60 + 20 three times, 40 + 40 once
    assert packed.window_lengths.tolist() == [80, 80, 80, 80]
    assert all((window["position_ids"] == 0).sum() == 2 for window in (packed[i] for i in range(4)))
    for seed in range(8):  # two 40s in one window would leave a 60 alone: only longest first needs no fourth window
        assert len(pack(texts(39, 39, 39, 59, 59, 59), context=100, eos_token_id=EOS, seed=seed)) == 3


def test_long_documents_fill_whole_windows_first() -> None:
    packed = pack(texts(25, 4), context=10, eos_token_id=EOS)  # 26 = 10 + 10 + 6 and 5
    assert sorted(packed.window_lengths.tolist()) == [5, 6, 10, 10]
    assert pack(texts(25, 3), context=10, eos_token_id=EOS).window_lengths.tolist() == [10, 10, 10]  # 6 and 4 share one


def test_the_end_token_is_appended_once_and_only_to_texts() -> None:
    ended = TokenizedDocument("ended", np.asarray([5, 6, EOS], dtype=np.int32))
    packed = pack([ended], context=8, eos_token_id=EOS)
    assert packed[0]["input_ids"].tolist() == [5, 6, EOS]
    assert pack(texts(2), context=8, eos_token_id=EOS)[0]["input_ids"].tolist() == [1, 2, EOS]
    assert pack(texts(2), context=8, eos_token_id=None)[0]["input_ids"].tolist() == [1, 2]
    window = pack([chat(2, 2)], context=8, eos_token_id=EOS)[0]
    assert window["input_ids"].tolist() == [1, 2, 3, 4]
    assert window["labels"].tolist() == [IGNORED, IGNORED, 3, 4]


def test_padding_is_a_document_of_its_own_without_targets() -> None:
    window = pack(texts(3), context=7, eos_token_id=EOS, pad_token_id=9)[0]
    assert window["input_ids"].tolist() == [1, 2, 3, EOS, 9, 9, 9]
    assert window["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert window["labels"].tolist() == [IGNORED, 2, 3, EOS, IGNORED, IGNORED, IGNORED]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("split", [[1, 2, 3, 4], [5, 6]]), ("truncate_left", [[3, 4, 5, 6]]), ("truncate_right", [[1, 2, 3, 4]])],
)
def test_chats_that_are_too_long_follow_the_policy(policy: str, kept: list[list[int]]) -> None:
    packed = pack([chat(2, 4)], context=4, eos_token_id=EOS, long_chat=policy)
    assert sorted(packed[i]["input_ids"].tolist() for i in range(len(packed))) == kept


def test_chats_that_are_too_long_are_an_error_with_counts_until_a_policy_is_chosen() -> None:
    rows = [chat(2, 4, name="a:1"), chat(2, 6, name="a:2"), chat(1, 2, name="a:3")]
    with pytest.raises(
        DataError, match=r"2 of 3 chats are longer than context 4; the longest, a:2, has 8 tokens"
    ) as caught:
        pack(rows, context=4, eos_token_id=EOS)
    assert "cuts 6 tokens" in str(caught.value)
    assert "loses 14 tokens" in str(caught.value)
    assert len(pack(rows, context=4, eos_token_id=EOS, long_chat="drop")) == 1
    with pytest.raises(DataError, match="1 of 1 texts are longer than context 4"):
        pack(texts(9), context=4, eos_token_id=EOS, split=False)


def test_pieces_that_teach_nothing_are_left_out() -> None:
    packed = pack(
        [chat(9, 2)], context=5, eos_token_id=EOS, long_chat="split"
    )  # 5 and 4 prompt tokens, then 1 + 1 answer
    assert [packed[i]["input_ids"].tolist() for i in range(len(packed))] == [[6, 7, 8, 9, 10]]
    with pytest.raises(DataError, match="no token to train on is left at context 5"):
        pack([chat(5, 1)], context=5, eos_token_id=EOS, long_chat="truncate_right")


def test_an_order_visits_every_window_once_an_epoch_and_is_made_again_from_the_seed() -> None:
    packed = pack(texts(*range(5, 45)), context=16, eos_token_id=EOS, seed=3)
    first, second = (packed.order(epoch).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(len(packed)))
    assert first != second
    again = pack(texts(*range(5, 45)), context=16, eos_token_id=EOS, seed=3)
    assert again.order(1).tolist() == second
    assert torch.equal(again[second[7]]["input_ids"], packed[second[7]]["input_ids"])
    assert again.window_lengths[again.longest] == 16
    other = pack(texts(*range(5, 45)), context=16, eos_token_id=EOS, seed=4)
    assert other.order(0).tolist() != packed.order(0).tolist()


def test_the_order_of_an_epoch_is_pinned_across_machines_and_versions() -> None:
    packed = pack(texts(*[9] * 6), context=10, eos_token_id=EOS, seed=0)
    assert packed.order(0).tolist() == [4, 3, 5, 1, 2, 0]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="context 1: must be at least 2"):
        pack(texts(3), context=1, eos_token_id=EOS)
    with pytest.raises(ConfigError, match="long_chat 'cut': allowed are error, split"):
        pack(texts(3), context=4, eos_token_id=EOS, long_chat="cut")
    with pytest.raises(IndexError):
        pack(texts(3), context=4, eos_token_id=EOS)[1]
