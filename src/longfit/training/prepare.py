"""From settings to models: one ready to train, a finished run ready to use.

The only place where the config becomes arguments of the floors below. Training, ``longfit eval`` and ``longfit chat``
share these steps, so that what is measured is what was trained. Documents and tokens are `prepare_data.py`.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from longfit.config import RunConfig, load_config
from longfit.data.packing import PackedDataset
from longfit.data.tokenizing import TokenizedSet
from longfit.engine.hf_model import base_model
from longfit.engine.sweep.install import change_sweep, enable_sweep, stream_weights
from longfit.errors import ConfigError
from longfit.kernels.cpu import processor
from longfit.model.adapters import adapter_report, add_adapters
from longfit.model.compute_dtype import compute_in
from longfit.model.context import ContextReport, extend_context
from longfit.model.liger_kernels import fuse
from longfit.model.load import auto_dtype, load
from longfit.model.own_rows import OwnRows
from longfit.model.save import load_adapter, restore_chat
from longfit.model.vocabulary import added_rows
from longfit.training import run_directory
from longfit.training.metrics import Event, OnEvent
from longfit.words import format_bytes

NO_NEW_TOKENS = "adapter.train_new_tokens: there are none, every token of the tokenizer has a row already"


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
    own = run_directory.read_config(run_dir)
    config = config or own
    adapter = run_directory.find_adapter(run_dir, checkpoint)
    if device.type == "cpu" and config.model.dtype != "float32" and processor.auto_dtype()[0] == "float32":
        config = config.replace({"model.dtype": "float32"}, origin="auto: fast on this processor")
    model, tokenizer = load_base(config.replace({"model.dtype": own.model.dtype}), device)
    if config.model.dtype not in ("auto", own.model.dtype):
        compute_in(model, getattr(torch, config.model.dtype))
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
