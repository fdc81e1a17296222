"""Tokens on disk equal those in memory; an entry is whole or not there, whoever else writes it and whoever dies."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.data.chat_templates import SHAPES, make_tokenizer

import longfit
from longfit.config.sections import DataSection
from longfit.data import token_cache
from longfit.data.document import Document
from longfit.data.documents import Documents
from longfit.data.messages import read_chat
from longfit.data.tokenizing import TokenizedSet
from longfit.training.metrics import Event
from longfit.training.prepare_data import tokenize

FAMILY = "ChatML (SmolLM2)"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGFIT_CACHE", str(tmp_path / "cache"))


def chats(count: int = 5) -> Documents:
    turns = [
        [
            {"role": "user", "content": f"q {n}", "name": "bob"},
            {"role": "assistant", "content": "the answer " * n + "."},
        ]
        for n in range(count)
    ]
    return Documents.of(Document(f"ä.jsonl:{n}", chat=read_chat(chat)) for n, chat in enumerate(turns))


def same(one: TokenizedSet, other: TokenizedSet) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert (mine.name, mine.num_special, mine.is_chat) == (theirs.name, theirs.num_special, theirs.is_chat)
        assert np.array_equal(mine.input_ids, theirs.input_ids)
        assert (mine.trained is None) == (theirs.trained is None)
        assert mine.trained is None or (theirs.trained is not None and np.array_equal(mine.trained, theirs.trained))
    assert (one.notes.counts, one.notes.unread, one.notes.ends) == (
        other.notes.counts, other.notes.unread, other.notes.ends,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["chats", "texts"])
def test_tokens_from_the_cache_are_those_of_memory(kind: str) -> None:
    tokenizer = make_tokenizer(SHAPES[FAMILY])
    texts = Documents.of(Document(f"t{n}", text="x <|im_end|> y " * n) for n in range(1, 4))
    documents = chats() if kind == "chats" else texts
    events: list[Event] = []
    expected = tokenize(documents, tokenizer, DataSection(path="p", cache="off"))
    for _ in range(2):
        found = tokenize(documents, tokenizer, DataSection(path="p", cache="on"), on_event=events.append)
        same(found, expected)
        assert isinstance(found[0].input_ids, np.memmap)
    assert [event.text for event in events if "in the cache" in event.text]
    assert len(list((token_cache.cache_folder() / "tokens").iterdir())) == 1
    if kind == "chats":
        tokenize(documents, tokenizer, DataSection(path="p", cache="on", train_on="last"))
        tokenize(chats(6), tokenizer, DataSection(path="p", cache="on"))
        tokenizer.chat_template = (tokenizer.chat_template or "") + " "
        tokenize(documents, tokenizer, DataSection(path="p", cache="on"))
        assert len(list((token_cache.cache_folder() / "tokens").iterdir())) == 4


def test_small_sets_are_not_cached_and_refused_ones_leave_nothing() -> None:
    tokenizer = make_tokenizer(SHAPES[FAMILY])
    tokenize(chats(), tokenizer, DataSection(path="p"))
    assert not token_cache.cache_folder().exists()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="refuses this row"):
        tokenize(chats(), tokenizer, DataSection(path="p", cache="on"))
    assert list((token_cache.cache_folder() / "tokens").iterdir()) == []


def test_whoever_finishes_second_takes_what_is_there() -> None:
    place = token_cache.cache_folder() / "tokens" / "key"
    tokenizer = make_tokenizer(SHAPES[FAMILY])
    expected = tokenize(chats(), tokenizer, DataSection(path="p"))
    first = token_cache.TokenWriter(place)
    first.folder = first.folder.rename(first.folder.with_name(".key.1.unfinished"))  # as another process calls it
    second = token_cache.TokenWriter(place)
    for writer in (second, first):
        writer.extend(expected)
        writer.finish(expected)
    found = token_cache.read_entry(place)
    assert found is not None
    same(found, expected)
    assert [path.name for path in place.parent.iterdir()] == ["key"]


def test_a_process_that_is_killed_leaves_no_entry_and_its_rest_is_removed_later() -> None:
    place = token_cache.cache_folder() / "tokens" / "key"
    code = (
        "import os, signal, sys; from pathlib import Path; from longfit.data.token_cache import TokenWriter;"
        "TokenWriter(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(longfit.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code, str(place)], env=environment, check=False)
    (rest,) = place.parent.iterdir()
    assert rest.name.endswith(".unfinished")
    assert token_cache.read_entry(place) is None
    long_ago = time.time() - token_cache.UNFINISHED_SECONDS - 1
    os.utime(rest, (long_ago, long_ago))
    token_cache.TokenWriter(place).abandon()
    assert rest.is_dir()  # something was written into it a moment ago
    for written in (*rest.iterdir(), rest):
        os.utime(written, (long_ago, long_ago))
    token_cache.TokenWriter(place).abandon()
    assert list(place.parent.iterdir()) == []


def test_what_was_used_longest_ago_is_removed_when_the_cache_is_full() -> None:
    tokenizer = make_tokenizer(SHAPES[FAMILY])
    folder = token_cache.cache_folder() / "tokens"
    sets = [tokenize(chats(count), tokenizer, DataSection(path="p", cache="on")) for count in (5, 4)]
    old, used = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for age, path in ((200, old), (300, used)):
        os.utime(path, (time.time() - age, time.time() - age))
    size = sum(file.stat().st_size for path in (old, used) for file in path.iterdir())
    limited = DataSection(path="p", cache="on", cache_limit=size + 1)
    tokenize(chats(4), tokenizer, limited)  # used once more, so it stays
    tokenize(chats(3), tokenizer, limited)
    left = set(folder.iterdir())
    assert old not in left
    assert used in left
    assert len(left) == 2
    same(sets[0], tokenize(chats(5), tokenizer, DataSection(path="p", cache="off")))  # who has it mapped keeps it
