"""From settings to tokens: documents are read, tokenised, packed and accounted for, alike in a run, `data` and `eval`.

The only place where the config becomes arguments of the room ``data``. What this is not: it reads no weights, and
imports nothing that does, so that ``longfit data`` starts as soon as a tokenizer does (`prepare.py` makes models).
"""

import os
import time
from collections.abc import Collection
from contextlib import suppress
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from longfit.config import RunConfig
from longfit.config.sections import DataSection
from longfit.data.chat_encoder import ChatEncoder
from longfit.data.chat_view import Part, view_chat
from longfit.data.documents import Documents, read_documents, split_documents
from longfit.data.ledger import Ledger
from longfit.data.packing import PackedDataset, pack
from longfit.data.token_cache import CACHED_BYTES, TokenWriter, cache_folder, entry_key, read_entry
from longfit.data.tokenizing import TokenizedSet, tokenize_documents
from longfit.engine.host_memory import give_back
from longfit.errors import DataError
from longfit.files.reading import NOT_OURS, reason
from longfit.files.writing import writing
from longfit.kernels.cpu.threads import usable_cores
from longfit.model import gguf
from longfit.model.description import read_config, read_tokenizer
from longfit.model.token_mixing import STATE, carries_state
from longfit.notice import notify as tell
from longfit.training.metrics import Event, OnEvent, ignore


def read_data(config: RunConfig, *, on_event: OnEvent = ignore) -> tuple[Documents, Documents | None]:
    """Read the training documents and, if there are any, those held out."""
    data = config.data
    documents = read_path(data.path, data, on_event=on_event)
    if data.validation is not None:
        return documents, read_path(data.validation, data, on_event=on_event)
    if not data.validation_fraction:
        return documents, None
    return split_documents(documents, validation_fraction=data.validation_fraction, seed=config.train.seed)


def read_path(path: str, data: DataSection, *, on_event: OnEvent = ignore) -> Documents:
    """Read the documents under a path as a run reads its own."""
    told = Progress("read", on_event)
    documents = read_documents(
        path,
        text_column=data.text_column,
        columns=data.columns,
        encoding=data.encoding,
        exclude=data.exclude,
        normalise=data.normalise,
        bad_rows=data.bad_rows,
        cache=None if data.cache == "off" else cache_folder() / "documents",
        cached_bytes=CACHED_BYTES if data.cache == "auto" else 0,
        on_document=told,
    )
    give_back(torch.device("cpu"))  # what told documents apart that are equal, 100 bytes each, and their texts
    return documents


def tokenize(
    documents: Documents,
    tokenizer: Any,
    data: DataSection,
    *,
    stop_ids: Collection[int] = (),
    on_event: OnEvent = ignore,
) -> TokenizedSet:
    """Tokenise documents as a run tokenises its own; a large set once, and from then on it is mapped from the cache."""
    settings: dict[str, Any] = {
        "template": data.chat_template,
        "train_on": data.train_on,
        "template_drops": data.template_drops,
        "bad_rows": data.bad_rows,
        "date": data.date,
        "control_tokens": data.control_tokens,
        "stop_ids": sorted(stop_ids),
    }
    told = Progress("tokenised", on_event, total=len(documents))
    large = documents.report.num_bytes >= CACHED_BYTES
    processes = _processes() if large or data.cache == "on" else 1
    kept = data.cache == "on" or (data.cache == "auto" and large)
    key = entry_key(tokenizer, documents=documents.digest(), **settings) if kept else None
    if key is None:
        return tokenize_documents(documents, tokenizer, **settings, processes=processes, on_document=told)
    place = cache_folder() / "tokens" / key
    if (found := read_entry(place)) is not None:
        on_event(Event("phase", f"tokens of {len(documents):,} documents are in the cache: {place}"))
        return found
    do = "name another folder with LONGFIT_CACHE, or go without: data.cache=off"
    with writing(place, error=DataError, then=do):
        writer = TokenWriter(place, limit_bytes=data.cache_limit)
        try:
            found = tokenize_documents(
                documents, tokenizer, **settings, processes=processes, on_document=told, sink=writer
            )
        except BaseException:
            writer.abandon()
            raise
    give_back(torch.device("cpu"))  # what the tokenizer held of a batch: packing comes on top
    return found


def _processes() -> int:
    """Cores for each of the processes that torchrun has started on this machine."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Progress:
    """Say every second how many documents are done, and how long the others will take."""

    SECONDS = 1.0

    def __init__(self, what: str, on_event: OnEvent, *, total: int | None = None) -> None:
        self.what, self.on_event, self.total = what, on_event, total
        self.began = time.monotonic()
        self.next_at = self.began + self.SECONDS

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now < self.next_at:
            return
        self.next_at = now + self.SECONDS
        text = f"{self.what} {done:,} documents"
        if self.total is not None:
            left = (now - self.began) * (self.total - done) / max(1, done)
            text = f"{self.what} {done:,} of {self.total:,} documents, {left:,.0f} s left"
        self.on_event(Event("count", text, {"done": done, "of": self.total}))


def stop_ids(name: str) -> tuple[int, ...]:
    """The tokens at which a base model's own settings stop generation; none where it has no such settings."""
    if gguf.is_gguf(Path(name)):
        return ()
    try:
        found = GenerationConfig.from_pretrained(name).eos_token_id
        return tuple(map(int, found)) if isinstance(found, list) else () if found is None else (int(found),)
    except NOT_OURS:
        raise
    except BaseException as error:  # the file is optional
        if (Path(name) / "generation_config.json").exists():
            tell(f"{name}: generation_config.json cannot be read ({reason(error)}): going on without it")
        return ()


def num_shared(held_out: Documents | None, documents: Documents) -> int:
    """How many held-out documents are among those that are trained on."""
    return 0 if held_out is None else held_out.num_shared(documents)


def resolve_date(config: RunConfig, documents: Documents) -> RunConfig:
    """Hold the day that chat templates may print, so that a run that goes on later sees the same tokens."""
    if not documents.is_chat or config.data.date is not None:
        return config
    return config.replace({"data.date": f"{date.today()}"}, origin="auto: the day the run began")


def pack_documents(
    documents: Documents, tokenizer: Any, config: RunConfig, *, alone: bool = False, on_event: OnEvent = ignore
) -> PackedDataset:
    data, context = config.data, config.context.context
    assert context is not None, "resolved"
    tokenized = tokenize(documents, tokenizer, data, stop_ids=stop_ids(config.model.name), on_event=on_event)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return pack(
        tokenized,
        context=context,
        eos_token_id=tokenizer.eos_token_id,
        long_chat=data.long_chat,
        pad_token_id=None if config.train.batch_size == 1 else padding or 0,  # windows of a batch must stack
        alone=alone,
        seed=config.train.seed,
    )


def native_context(model_config: Any) -> int:
    """Return the tokens a base model was made for, from its configuration as it was loaded."""
    return int(model_config.get_text_config().max_position_embeddings)


ONLY_A_RUN_KNOWS = (
    "counted as if documents shared windows, which they do where a run finds that its swept layers begin each without "
    "a state; else it gives each a window, and says so"
)


def count_tokens(config: RunConfig, *, on_event: OnEvent) -> Ledger:
    """Account for every token of the data as a run of this config would pack it; reads no weights.

    Raises: DataError, ModelError: the data or the tokenizer cannot be read.
    """
    name = config.model.name
    on_event(Event("phase", f"reading {config.data.path}"))
    documents, held_out = read_data(config, on_event=on_event)
    config = resolve_date(config, documents)
    model_config, tokenizer = read_config(name), read_tokenizer(name)
    native = native_context(model_config)
    on_event(Event("phase", "packing the text into windows"))
    mixing = carries_state(model_config)
    swept = mixing is not None and mixing.endswith(STATE) and config.engine.engine == "sweep"
    if swept:
        on_event(Event("phase", f"{mixing}: {ONLY_A_RUN_KNOWS}", {"mixing": mixing}))
    elif mixing is not None:
        on_event(Event("phase", f"one document a window: {mixing}", {"mixing": mixing}))
    config = config.resolve(native_context=native)
    alone = mixing is not None and not swept
    windows = pack_documents(documents, tokenizer, config, alone=alone, on_event=on_event)
    return Ledger.of(
        windows,
        native_context=native,
        report=documents.report,
        tokenizer=tokenizer,
        num_validation_seen=num_shared(held_out, documents),
    )


def view_chats(config: RunConfig, *, count: int) -> list[list[Part]]:
    """Show the renderings of the first chats of the data in parts; none where they are texts.

    Raises: DataError, ModelError: as `count_tokens`; chats that are refused are left out.
    """
    documents = read_path(config.data.path, config.data)
    if not documents.is_chat:
        return []
    config, name, data = resolve_date(config, documents), config.model.name, config.data
    tokenizer = read_tokenizer(name)
    encoder = ChatEncoder(
        tokenizer, template=data.chat_template, train_on=data.train_on, date=config.data.date, stop_ids=stop_ids(name)
    )
    views: list[list[Part]] = []
    for document in islice(documents, count):
        assert document.chat is not None
        with suppress(DataError):  # said by `count_tokens`, for all of them
            views += view_chat(document.chat, encoder)
    return views


def read_token_ids(
    path: str, tokenizer: Any, *, data: DataSection | None = None, max_tokens: int | None = None
) -> list[torch.Tensor]:
    """Read the documents under a path as tokens, for measuring.

    Args:
        data: how a run reads its data; None for the defaults. The chat template is the tokenizer's in any case, which
            for a run is the one that it was trained with.
    Returns: int64 ``[N]`` for each document, together at most ``max_tokens``.
    Raises: DataError: nothing readable.
    """
    left = max_tokens
    rows = []
    data = data or DataSection(path=path)
    if tokenizer.chat_template:
        data = data.model_copy(update={"chat_template": None})
    for document in tokenize(read_path(path, data), tokenizer, data):
        row = torch.from_numpy(document.input_ids[:left].astype("int64"))
        left = None if left is None else left - len(row)
        if len(row):
            rows.append(row)
    return rows
