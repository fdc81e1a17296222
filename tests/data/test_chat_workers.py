"""Several processes give the results of one, in its order; what goes wrong in one of them is told."""

import signal
from collections.abc import Iterator
from functools import partial
from itertools import count, islice

import pytest
from tests.data.chat_templates import SHAPES, make_tokenizer
from tests.data.test_token_cache import chats, same

from longfit.data.chat_workers import map_in_order
from longfit.data.tokenizing import tokenize_documents
from longfit.errors import DataError

FAMILY = "Qwen3"


def test_tokens_of_several_processes_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longfit.data.tokenizing.CHAT_BATCH_CHARS", 40)  # many batches
    tokenizer, done = make_tokenizer(SHAPES[FAMILY]), list[int]()
    expected = tokenize_documents(chats(12), tokenizer)
    found = tokenize_documents(chats(12), tokenizer, processes=3, on_document=done.append)
    same(found, expected)
    assert done == sorted(done)
    assert done[-1] == 12
    assert len(done) > 3


def test_results_come_in_order_and_no_further_than_they_are_asked_for() -> None:
    asked: list[int] = []

    def numbers() -> Iterator[int]:
        for number in count():
            asked.append(number)
            yield number

    results = map_in_order(partial(divmod, 7), (number + 1 for number in numbers()), processes=2)
    assert list(islice(results, 5)) == [divmod(7, number) for number in range(1, 6)]
    assert len(asked) <= 5 + 2  # one for each process
    results.close()


def test_what_a_process_raises_is_raised_and_one_that_dies_is_told() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_in_order(partial(divmod, 7), [1, 0, 2], processes=2))
    with pytest.raises(DataError, match=r"ended with code -9 \(killed, as when memory is short\); start again"):
        list(map_in_order(signal.raise_signal, [signal.SIGKILL], processes=1))
