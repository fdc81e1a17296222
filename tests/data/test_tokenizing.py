"""From documents to tokens: refusals are counted, control tokens in texts are text."""

import numpy as np
import pytest
from tests.data.chats import CHATS, says, user
from transformers import PreTrainedTokenizerFast

from longfit.data.document import Document
from longfit.data.messages import Chat, read_chat
from longfit.data.tokenizing import tokenize_documents
from longfit.errors import DataError


def test_bad_rows_are_all_counted_or_skipped(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers["ChatML (SmolLM2)"]
    bad = [Document(f"a:{i}", chat=Chat((says("x"), user("y")))) for i in range(12)]
    good = Document("good", chat=read_chat(CHATS["single"][0]))
    with pytest.raises(DataError) as caught:
        tokenize_documents([*bad, good], tokenizer)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("a:0: the chat begins with the assistant")
    assert lines[-2:] == [
        "... and 2 more rows",
        "12 of 13 rows cannot be trained on; correct them, or leave them out with data.bad_rows=skip",
    ]
    found = tokenize_documents([*bad, good], tokenizer, bad_rows="skip")
    assert (len(found), len(found.skipped)) == (1, 12)


def test_control_tokens_in_plain_text_are_text_unless_they_are_to_be_control(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    family = "Llama-3"
    tokenizer, text = tokenizers[family], "see <|eot_id|> and <|begin_of_text|> here"
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    as_text = tokenize_documents([Document("a", text=text), Document("b", text="plain")], tokenizer)
    assert as_text[0].input_ids[0] == tokenizer.bos_token_id
    assert not np.isin(as_text[0].input_ids[1:], tokenizer.all_special_ids).any()
    assert tokenizer.decode(as_text[0].input_ids[1:]) == text
    assert (as_text[0].num_special, as_text.notes.counts.total()) == (0, 1)
    control = tokenize_documents([Document("a", text=text)], tokenizer, control_tokens="control")
    assert end in control[0].input_ids
    assert (control[0].num_special, control.notes.counts.total()) == (2, 0)


def test_what_decomposed_unicode_costs_is_measured(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers["Qwen2.5"]
    found = tokenize_documents([Document("a", text="ra\u0302\u0301t"), Document("b", text="đẹp")], tokenizer)
    as_it_is, composed = (len(tokenizer(text)["input_ids"]) for text in ("ra\u0302\u0301t", "rất"))
    assert found.notes.decomposed == {"as it is": as_it_is, "composed": composed}
    assert as_it_is > composed
