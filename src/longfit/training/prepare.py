"""From settings to things: documents, a model ready to train, a finished run ready to use.

The only place where the config becomes arguments of the floors below. Training, ``longfit data`` and ``longfit eval``
share these steps, so that what is shown and measured is what was trained.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from longfit.config import RunConfig
from longfit.data.ledger import Ledger
from longfit.data.packing import PackedDataset, pack, tokenize_documents
from longfit.data.sources import Documents, read_documents, split_documents
from longfit.engine.hf_model import base_model
from longfit.engine.sweep.install import change_sweep, enable_sweep, stream_weights
from longfit.errors import ConfigError
from longfit.kernels.cpu import processor
from longfit.model import gguf
from longfit.model.adapters import add_adapters
from longfit.model.context import ContextReport, extend_context
from longfit.model.fused import fuse
from longfit.model.load import auto_dtype, load, read_config, read_tokenizer
from longfit.model.save import load_adapter
from longfit.training import run_directory
from longfit.training.metrics import Event, OnEvent
from longfit.words import format_bytes


def read_data(config: RunConfig) -> tuple[Documents, Documents | None]:
    """Read the training documents and, if there are any, those held out."""
    data = config.data

    def read(path: str) -> Documents:
        return read_documents(path, text_column=data.text_column, encoding=data.encoding, exclude=data.exclude)

    documents = read(data.path)
    if data.validation is not None:
        return documents, read(data.validation)
    if not data.validation_fraction:
        return documents, None
    return split_documents(documents, validation_fraction=data.validation_fraction, seed=config.train.seed)


def pack_documents(documents: Documents, tokenizer: Any, config: RunConfig) -> PackedDataset:
    data, context = config.data, config.context.context
    assert context is not None, "resolved"
    tokenized = tokenize_documents(documents, tokenizer, template=data.chat_template, train_turns=data.train_turns)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return pack(
        tokenized,
        context=context,
        eos_token_id=tokenizer.eos_token_id,
        long_chat=data.long_chat,
        pad_token_id=None if config.train.batch_size == 1 else padding or 0,  # windows of a batch must stack
        seed=config.train.seed,
    )


def load_base(config: RunConfig, device: torch.device) -> tuple[Any, Any]:
    section = config.model
    return load(
        section.name,
        quant=section.quant,
        double_quant=section.double_quant,
        block_size=section.block_size,
        int8_threshold=section.int8_threshold,
        dtype=None if section.dtype == "auto" else getattr(torch, section.dtype),
        device=device,
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
    torch.manual_seed(config.train.seed)
    model = add_adapters(
        model,
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        targets=adapter.targets,
        train_embeddings=adapter.train_embeddings,
        train_norms=adapter.train_norms,
    )
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
    documents, _ = read_data(config)
    if gguf.is_gguf(Path(name)):
        model_config, tokenizer = gguf.read_config(Path(name)), gguf.read_tokenizer(Path(name))
    else:
        model_config, tokenizer = read_config(name), read_tokenizer(name)
    native = native_context(model_config)
    on_event(Event("phase", "packing the text into windows"))
    windows = pack_documents(documents, tokenizer, config.resolve(native_context=native))
    return Ledger.of(windows, native_context=native, report=documents.report, tokenizer=tokenizer)


def open_run(run_dir: str | Path, *, device: torch.device | str | None = None) -> tuple[Any, Any, RunConfig]:
    """Load what a run produced: its base, extended as it was, with its adapter (or the newest checkpoint's).

    It computes in the run's dtype, or in float32 where the run's is a 16-bit one that this processor would emulate.

    Args:
        run_dir: the directory that ``longfit train`` made.
        device: where the model goes; the first CUDA device if there is one, else the CPU.
    Returns: the model in eval mode, its tokenizer, the config of the run.
    Raises: RunError: no run there, or nothing saved in it.
    """
    run_dir, device = Path(run_dir), _device(device)
    config = run_directory.read_config(run_dir)
    adapter = run_dir / "adapter"
    if not adapter.is_dir():
        adapter = run_directory.last_checkpoint(run_dir) / "adapter"
    if device.type == "cpu" and config.model.dtype != "float32" and processor.auto_dtype()[0] == "float32":
        config = config.replace({"model.dtype": "float32"}, origin="auto: fast on this processor")
    model, tokenizer = load_base(config, device)
    extend(model, tokenizer, config)
    return load_adapter(model, adapter).eval(), tokenizer, config


def open_target(target: str | Path, *, quant: str = "nf4", device: torch.device | None = None) -> tuple[Any, Any]:
    """Load a run directory with `open_run`, or a base model as it is: not extended, exact attention, in eval mode.

    Returns: the model and its tokenizer.
    """
    if (Path(target) / "config.yaml").is_file():
        return open_run(target, device=device)[:2]
    return load(target, quant=quant, device=_device(device))


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def read_token_ids(path: str, tokenizer: Any, *, max_tokens: int | None = None) -> list[torch.Tensor]:
    """Read the documents under a path as tokens, for measuring.

    Returns: int64 ``[N]`` for each document, together at most ``max_tokens``.
    Raises: DataError: nothing readable.
    """
    left = max_tokens
    rows = []
    for document in tokenize_documents(read_documents(path), tokenizer):
        row = torch.from_numpy(document.input_ids[:left].astype("int64"))
        left = None if left is None else left - len(row)
        if len(row):
            rows.append(row)
    return rows
