"""From settings to things: documents, a model ready to train, a finished run ready to use.

The only place where the config becomes arguments of the floors below. Training, ``longfit data`` and ``longfit eval``
share these steps, so that what is shown and measured is what was trained.
"""

import os
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from longfit.config import RunConfig, load_config
from longfit.config.sections import DataSection
from longfit.data.chat_encoder import ChatEncoder
from longfit.data.chat_view import Part, view_chat
from longfit.data.documents import Documents, read_documents, split_documents
from longfit.data.ledger import Ledger
from longfit.data.packing import PackedDataset, pack
from longfit.data.token_cache import CACHED_BYTES, TokenWriter, cache_folder, entry_key, read_entry
from longfit.data.tokenizing import TokenizedSet, tokenize_documents
from longfit.engine.hf_model import base_model
from longfit.engine.sweep.install import change_sweep, enable_sweep, stream_weights
from longfit.errors import ConfigError, DataError
from longfit.files.reading import NOT_OURS, reason
from longfit.files.writing import writing
from longfit.kernels.cpu import processor
from longfit.kernels.cpu.threads import usable_cores
from longfit.model import gguf
from longfit.model.adapters import adapter_report, add_adapters
from longfit.model.context import ContextReport, extend_context
from longfit.model.liger_kernels import fuse
from longfit.model.load import auto_dtype, load, read_config, read_tokenizer
from longfit.model.own_rows import OwnRows
from longfit.model.save import load_adapter, restore_chat
from longfit.model.token_mixing import carries_state
from longfit.model.vocabulary import added_rows
from longfit.notice import notify as tell
from longfit.training import run_directory
from longfit.training.metrics import Event, OnEvent, ignore
from longfit.words import format_bytes

NO_NEW_TOKENS = "adapter.train_new_tokens: there are none, every token of the tokenizer has a row already"


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
    return read_documents(
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
    large = data.cache == "on" or (data.cache == "auto" and documents.report.num_bytes >= CACHED_BYTES)
    key = entry_key(tokenizer, documents=documents.digest(), **settings) if large else None
    if key is None:
        return tokenize_documents(documents, tokenizer, **settings, on_document=told)
    place = cache_folder() / "tokens" / key
    if (found := read_entry(place)) is not None:
        on_event(Event("phase", f"tokens of {len(documents):,} documents are in the cache: {place}"))
        return found
    do = "name another folder with LONGFIT_CACHE, or go without: data.cache=off"
    with writing(place, error=DataError, then=do):
        writer = TokenWriter(place)
        try:
            return tokenize_documents(
                documents, tokenizer, **settings, processes=_processes(), on_document=told, sink=writer
            )
        except BaseException:
            writer.abandon()
            raise


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


def remember_chat(model: Any, tokenizer: Any, windows: PackedDataset) -> None:
    """Give the tokenizer the template that chats were trained with, and the model the tokens that end its answers.

    Both are saved with the adapter, so whoever uses it asks as it was trained, and stops where it was taught to.
    """
    found = windows.documents
    if not isinstance(found, TokenizedSet) or found.template is None:
        return
    tokenizer.chat_template = found.template.source
    ends = {int(token) for token in tokenizer.convert_tokens_to_ids(sorted(found.notes.ends))}
    generation = base_model(model).generation_config
    if generation is not None:
        known = generation.eos_token_id
        known = known if isinstance(known, list) else [] if known is None else [known]
        generation.eos_token_id = [*known, *sorted(ends - set(known))]


def load_base(
    config: RunConfig, device: torch.device, *, own_rows: OwnRows | None = None, begins: bool = False
) -> tuple[Any, Any]:
    """The base of a run and its tokenizer.

    Args:
        own_rows: as `load` takes it.
        begins: whether adapters will begin on it as ``adapter.start`` says.
    """
    section = config.model
    return load(
        section.name,
        quant=section.quant,
        double_quant=section.double_quant,
        block_size=section.block_size,
        int8_threshold=section.int8_threshold,
        int8_modules=section.int8_modules,
        resize_embeddings=config.adapter.train_new_tokens,
        dtype=None if section.dtype == "auto" else getattr(torch, section.dtype),
        device=device,
        own_rows=own_rows,
        start=config.adapter.start if begins else "standard",
        start_rank=config.adapter.rank,
    )


def resolve_dtype(config: RunConfig, device: torch.device, *, on_event: OnEvent) -> RunConfig:
    """Fill ``model.dtype`` where it is auto, so that a run is resumed in the dtype it began in, and say what it is."""
    chosen: str = config.model.dtype
    if chosen == "auto":
        dtype, reason = auto_dtype(device)
        chosen = str(dtype).removeprefix("torch.")
        config = config.replace({"model.dtype": chosen}, origin=f"auto: {reason}")
        on_event(Event("phase", f"computing in {chosen}: {reason}"))
    elif device.type == "cpu" and chosen != "float32" and processor.auto_dtype()[0] == "float32":
        reason = processor.auto_dtype()[1]
        on_event(Event("warning", f"model.dtype={chosen}: {reason}, so it is emulated; float32 is many times faster"))
    return config


def extend(model: Any, tokenizer: Any, config: RunConfig) -> ContextReport:
    """Extend the model to the context of the config, with its attention."""
    section = config.context
    assert section.context is not None, "resolved"
    return extend_context(
        model,
        tokenizer,
        context=section.context,
        rope=section.rope,
        attention=section.attention,
        group_size=section.group_size,
    )


def make_trainable(model: Any, config: RunConfig, *, on_event: OnEvent) -> Any:
    """Add adapters, choose what computes norms and MLPs on a card, and how layers are differentiated.

    Returns: the PeftModel.
    """
    adapter = config.adapter
    new_tokens = adapter.train_new_tokens and bool(added_rows(model.config))
    if adapter.train_new_tokens:
        rows = added_rows(model.config)
        text = f"{len(rows):,} new tokens get a row, from {rows.start:,} on" if rows else NO_NEW_TOKENS
        on_event(Event("phase" if rows else "warning", text, {"new_tokens": len(rows)}))
    torch.manual_seed(config.train.seed)
    model = add_adapters(
        model,
        rank=adapter.rank,
        alpha=adapter.alpha,
        rank_stabilised=adapter.rank_stabilised,
        dropout=adapter.dropout,
        targets=adapter.targets,
        experts=adapter.experts,
        train_embeddings=adapter.train_embeddings,
        train_norms=adapter.train_norms,
        train_new_tokens=new_tokens,
    )
    if (begun := adapter_report(model).start) is not None:
        on_event(Event("phase", str(begun), {"lost": begun.lost, "left": begun.left}))
    fused = fuse(model, kernels=config.engine.fused)
    if model.device.type == "cuda":
        on_event(Event("phase", str(fused), {"modules": fused.modules}))
    if config.engine.engine == "sweep":
        sweep(model, config, on_event=on_event)
    else:
        base_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def sweep(model: Any, config: RunConfig, *, on_event: OnEvent) -> None:
    """Sweep the layers from now on, as ``engine`` says."""
    report = enable_sweep(model, **_sweep_settings(config))
    text = str(report).splitlines()[0]
    on_event(Event("phase", text, {"tile": report.tile, "fallback": report.fallback}))


def sweep_with_less(model: Any, config: RunConfig) -> None:
    """Go on sweeping as the config says by now: another tile, another place for layer inputs, less attention saved."""
    change_sweep(model, **_sweep_settings(config))


def _sweep_settings(config: RunConfig) -> dict[str, Any]:
    engine = config.engine
    return {
        "tile": engine.tile,
        "offload": engine.offload,
        "offload_folder": engine.offload_folder,
        "saved_attention_bytes": engine.saved_attention,
        "saved_products_bytes": engine.saved_products,
    }


def stream_frozen(model: Any, config: RunConfig, device: torch.device, *, on_event: OnEvent) -> None:
    """Move the frozen weights to where they wait, as ``engine.stream`` says; the model must be on its device by now.

    Raises: ConfigError: the place does not exist on this machine, or the run needs the weights in their place.
    """
    section = config.engine
    if section.stream == "none":
        return
    if section.stream == "ram" and device.type == "cpu":
        raise ConfigError("engine.stream=ram: on a CPU the weights are in host memory already; use file or none")
    folder = None if section.stream == "ram" else section.stream_folder or tempfile.gettempdir()
    try:
        report = stream_weights(model, folder=folder)
    except OSError as error:
        raise ConfigError(f"engine.stream_folder: {folder}: {error.strerror}; name a folder with room") from error
    text = f"streaming {format_bytes(report.num_bytes)} of frozen weights from {report.place}"
    on_event(Event("phase", text, {"num_bytes": report.num_bytes, "largest_bytes": report.largest_bytes}))


def native_context(model_config: Any) -> int:
    """Return the tokens a base model was made for, from its configuration as it was loaded."""
    return int(model_config.get_text_config().max_position_embeddings)


def count_tokens(config: RunConfig, *, on_event: OnEvent) -> Ledger:
    """Account for every token of the data as a run of this config would pack it; reads no weights.

    Raises: DataError, ModelError: the data or the tokenizer cannot be read.
    """
    name = config.model.name
    on_event(Event("phase", f"reading {config.data.path}"))
    documents, held_out = read_data(config, on_event=on_event)
    config = resolve_date(config, documents)
    if gguf.is_gguf(Path(name)):
        model_config, tokenizer = gguf.read_config(Path(name)), gguf.read_tokenizer(Path(name))
    else:
        model_config, tokenizer = read_config(name), read_tokenizer(name)
    native = native_context(model_config)
    on_event(Event("phase", "packing the text into windows"))
    mixing = carries_state(model_config)
    if mixing is not None:
        on_event(Event("phase", f"one document a window: {mixing}", {"mixing": mixing}))
    config = config.resolve(native_context=native)
    windows = pack_documents(documents, tokenizer, config, alone=mixing is not None, on_event=on_event)
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
    tokenizer = gguf.read_tokenizer(Path(name)) if gguf.is_gguf(Path(name)) else read_tokenizer(name)
    encoder = ChatEncoder(
        tokenizer, template=data.chat_template, train_on=data.train_on, date=config.data.date, stop_ids=stop_ids(name)
    )
    views: list[list[Part]] = []
    for document in islice(documents, count):
        assert document.chat is not None
        with suppress(DataError):  # said by `count_tokens`, for all of them
            views += view_chat(document.chat, encoder)
    return views


def target_config(
    target: str | Path,
    *,
    data: str | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, tuple[str, object]] | None = None,
) -> RunConfig:
    """Read the settings of a run, or make those of a base model, changed as the user says.

    Args:
        target: a run directory, or a base model.
        data: the path that is measured or talked about, if any.
        overrides: texts such as ``"model.dtype=float32"``.
        flags: ``{flag: (key, value)}`` of options.
    Raises: ConfigError: wrong settings, or some of a section that nothing but training reads.
    """
    path = Path(target) / "config.yaml"
    if path.is_file():
        own = {"--run-dir": ("output.run_dir", str(target))}
        config = load_config(path, overrides=overrides, flags={**own, **(flags or {})})
        changed = [key for key in config.given() if not config.origin(key).startswith((f"{path}:", "--run-dir"))]
    else:
        base = {"MODEL": ("model.name", str(target)), "--data": ("data.path", data or "(none)")}
        config = load_config(overrides=overrides, flags={**base, **(flags or {})})
        changed = [key for key in config.given() if config.origin(key) not in base]
    for key in changed:
        if key.partition(".")[0] not in ("model", "data"):
            raise ConfigError(f"{key}: only training reads it; here act model.* and data.*, such as data.text_column")
    return config


def open_run(
    run_dir: str | Path,
    *,
    device: torch.device | str | None = None,
    config: RunConfig | None = None,
    checkpoint: str | None = None,
) -> tuple[Any, Any, RunConfig]:
    """Load what a run produced: its base, extended as it was, with its best adapter (or its last).

    It computes in the run's dtype, or in float32 where the run's is a 16-bit one that this processor would emulate.

    Args:
        run_dir: the directory that ``longfit train`` made.
        device: where the model goes; the first CUDA device if there is one, else the CPU.
        config: the run's settings with changes, from `target_config`.
        checkpoint: ``"best"``, ``"last"``, or the name of a folder below ``checkpoints/``; default: the best, if kept.
    Returns: the model in eval mode, its tokenizer, the config of the run.
    Raises: RunError: no run there, or nothing saved in it.
    """
    run_dir, device = Path(run_dir), _device(device)
    config = config or run_directory.read_config(run_dir)
    adapter = run_directory.find_adapter(run_dir, checkpoint)
    if device.type == "cpu" and config.model.dtype != "float32" and processor.auto_dtype()[0] == "float32":
        config = config.replace({"model.dtype": "float32"}, origin="auto: fast on this processor")
    model, tokenizer = load_base(config, device)
    extend(model, tokenizer, config)
    restore_chat(model, tokenizer, adapter)
    return load_adapter(model, adapter).eval(), tokenizer, config


def open_target(
    target: str | Path,
    *,
    config: RunConfig | None = None,
    device: torch.device | None = None,
    checkpoint: str | None = None,
) -> tuple[Any, Any]:
    """Load a run directory with `open_run`, or a base model as it is: not extended, exact attention, in eval mode.

    Args:
        config: from `target_config`; None for the run's own settings, or the defaults.
    Returns: the model and its tokenizer.
    """
    config = config or target_config(target)
    if device is None and config.model.device != "auto":
        device = torch.device(config.model.device)
    if (Path(target) / "config.yaml").is_file():
        return open_run(target, device=device, config=config, checkpoint=checkpoint)[:2]
    return load_base(config, _device(device))


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


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
