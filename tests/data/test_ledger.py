"""The ledger adds up, whatever the documents, policies and padding are, and agrees with what the loss will see."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longfit.data.document import Document
from longfit.data.documents import Documents
from longfit.data.ledger import Ledger, Span, sample_spans
from longfit.data.packing import PackedDataset, TokenizedDocument, pack
from longfit.errors import DataError
from longfit.numerics.labels import IGNORED

EOS = 0


class Numbers:
    """A tokenizer as far as the ledger needs one: it decodes token 7 as '7'."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def document(length: int, mask: int | None, name: str = "d") -> TokenizedDocument:
    """Text, or a chat whose trained tokens are the bits of `mask`."""
    trained = None if mask is None else np.asarray([mask >> (t % 16) & 1 for t in range(length)], dtype=bool)
    return TokenizedDocument(name, np.arange(1, length + 1, dtype=np.int32), trained)


sets = st.lists(st.builds(document, st.integers(1, 40), st.none() | st.integers(0, 2**16 - 1)), min_size=1, max_size=15)


@given(
    documents=sets,
    context=st.integers(2, 20),
    long_chat=st.sampled_from(["split", "truncate_left", "truncate_right", "drop"]),
    pad=st.sampled_from([None, 99]),
    native=st.sampled_from([None, 5]),
)
@settings(max_examples=200, deadline=None)
def test_every_token_is_accounted_for_and_agrees_with_the_windows(
    documents: list[TokenizedDocument], context: int, long_chat: str, pad: int | None, native: int | None
) -> None:
    documents = [*documents, document(2, None)]  # so that there always is something to train on
    packed = pack(documents, context=context, eos_token_id=EOS, long_chat=long_chat, pad_token_id=pad)
    ledger = Ledger.of(packed, native_context=native)
    windows = [packed[i] for i in range(len(packed))]
    labels = np.concatenate([window["labels"].numpy() for window in windows])
    ids = np.concatenate([window["input_ids"].numpy() for window in windows])
    positions = np.concatenate([window["position_ids"].numpy() for window in windows])
    in_windows = ledger.trained_tokens + ledger.masked_tokens + ledger.start_tokens + ledger.boundary_tokens
    assert ledger.trained_tokens == (labels != IGNORED).sum()
    assert ledger.padded_tokens == (ids == 99).sum()
    assert in_windows + ledger.padded_tokens == len(ids)
    assert in_windows + ledger.cut_tokens + ledger.dropped_tokens == ledger.total_tokens
    assert ledger.total_tokens == sum(len(d.input_ids) + (not d.is_chat) for d in documents)
    assert ledger.start_tokens + ledger.boundary_tokens <= ((positions == 0) & (ids != 99)).sum()
    assert ledger.slack_tokens == len(packed) * context - in_windows
    assert Ledger.from_json(ledger.to_json()) == ledger


def test_each_kind_of_token_is_counted_as_what_it_is() -> None:
    chat = TokenizedDocument("c", np.arange(1, 7, dtype=np.int32), np.asarray([0, 0, 0, 1, 1, 1], dtype=bool))
    packed = pack([document(9, None), chat], context=4, eos_token_id=EOS, long_chat="truncate_right", pad_token_id=9)
    ledger = Ledger.of(packed)  # text: 4 + 4 + 2 with its end; chat: 3 prompt and 1 answer tokens kept, 2 cut
    assert (ledger.total_tokens, ledger.trained_tokens, ledger.masked_tokens) == (16, 3 + 3 + 1 + 1, 3)
    assert (ledger.start_tokens, ledger.boundary_tokens, ledger.cut_tokens, ledger.dropped_tokens) == (1, 2, 2, 0)
    assert (ledger.padded_tokens, ledger.num_split, ledger.num_cut, ledger.num_answers_without_end) == (2, 1, 1, 1)


def test_an_answer_lost_its_end_if_its_last_trained_token_is_in_no_window() -> None:
    ending_in_prompt = document(8, 0b00111000)  # the cut takes the third answer token and two of the turn after it
    whole = document(8, 0b00001100)  # the cut takes only what follows the answer
    packed = pack([ending_in_prompt, whole], context=5, eos_token_id=EOS, long_chat="truncate_right")
    assert Ledger.of(packed).num_answers_without_end == 1
    kept_end = pack([ending_in_prompt, whole], context=6, eos_token_id=EOS, long_chat="truncate_left")
    assert Ledger.of(kept_end).num_answers_without_end == 0


def test_lengths_are_nearest_rank_percentiles_and_warnings_carry_numbers() -> None:
    documents = [document(length, None, f"d{length}") for length in range(1, 100)]  # 2 to 100 tokens with the end
    ledger = Ledger.of(pack(documents, context=200, eos_token_id=EOS), native_context=90)
    assert (ledger.length_p50, ledger.length_p90, ledger.length_p99, ledger.length_max) == (51, 91, 100, 100)
    assert (ledger.num_longer_than_context, ledger.num_longer_than_native) == (0, 10)
    text = "\n".join(ledger.summary())
    assert "warning: context 200 is longer than any document (the longest has 100 tokens)" in text
    assert "warning: only 10 of 99 documents are longer than the model's native 90 tokens" in text
    assert "99 documents, 5,049 tokens" in text
    ledger = Ledger.of(pack(documents, context=50, eos_token_id=EOS), native_context=64)
    cut = "1 tokens of 1 documents are cut; context.context=100 keeps them whole"  # the end token of the document of 51
    assert ledger.warnings == (cut,)


def test_findings_of_the_sources_reach_the_ledger() -> None:
    twice = [Document("a", text="x"), Document("b", text="x"), Document("empty", text=" ")]
    report = Documents.of(twice).report
    ledger = Ledger.of(pack([document(3, None)], context=4, eos_token_id=EOS), report=report)
    assert (ledger.num_duplicates, ledger.num_empty) == (1, 1)
    assert any(line.startswith("1 empty documents left out; the first: empty") for line in ledger.warnings)
    assert any("1 documents repeat an earlier one" in line for line in ledger.warnings)


def test_warns_of_padding_and_of_control_tokens_in_the_text() -> None:
    spelled = TokenizedDocument("s", np.arange(1, 6, dtype=np.int32), num_special=2)
    warnings = Ledger.of(pack([spelled], context=12, eos_token_id=EOS, pad_token_id=9)).warnings
    assert any("padding wastes 50% of every step" in line for line in warnings)
    assert any("1 documents spell out control tokens" in line for line in warnings)


def test_the_sample_shows_where_training_begins_and_cuts_long_prompts_in_the_middle() -> None:
    tokenizer = Numbers()
    packed: PackedDataset = pack([document(6, 0b111000)], context=8, eos_token_id=EOS)
    assert sample_spans(packed, tokenizer) == (Span("1 2 3", False), Span("4 5 6", True))
    long = TokenizedDocument("l", np.arange(1, 101, dtype=np.int32), np.arange(100) >= 98)
    spans = sample_spans(pack([long], context=128, eos_token_id=EOS), tokenizer, max_tokens=8)
    assert spans == (Span("1 2 [... 94 tokens ...] 97 98", False), Span("99 100", True))
    assert Ledger.of(packed, tokenizer=tokenizer).sample == sample_spans(packed, tokenizer)


def test_a_damaged_ledger_is_refused() -> None:
    text = Ledger.of(pack([document(6, None)], context=8, eos_token_id=EOS)).to_json()
    with pytest.raises(DataError, match="does not add up: 8 tokens accounted for, 7 in the set"):
        Ledger.from_json(text.replace('"cut_tokens": 0', '"cut_tokens": 1'))
    with pytest.raises(DataError, match=r"missing or unknown keys: \['cut_tokens'\]"):
        Ledger.from_json(json.dumps({k: v for k, v in json.loads(text).items() if k != "cut_tokens"}))
    with pytest.raises(DataError, match="bad JSON at line 1 column 2"):
        Ledger.from_json("{")


def test_lengths_are_shown_by_powers_of_two_and_the_longest_by_name() -> None:
    documents = [TokenizedDocument(f"d{n}", np.arange(n, dtype=np.int32)) for n in [3, 4, 5, 40, *[7] * 30]]
    ledger = Ledger.of(pack(documents, context=16, eos_token_id=None), num_validation_seen=2)
    assert ledger.histogram == ((4, 2), (8, 31), (16, 0), (32, 0), (64, 1))
    assert ledger.longest[:2] == (("d40", 40), ("d7", 7))
    assert len(ledger.longest) == 20
    lines = ledger.lengths_view()
    assert sum("█" in line for line in lines) == 3
    assert [line for line in lines if "longer than the context" in line][-1].split()[2:4] == ["64", "1"]
    assert any("2 validation documents are trained on too" in line for line in ledger.warnings)
    assert Ledger.from_json(ledger.to_json()) == ledger
