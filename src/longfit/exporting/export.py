"""Hand a run on in the format that somebody else reads: GGUF, a GGUF adapter, safetensors, bitsandbytes' 4 bits.

Every format is made from the merged tensors (merge.py) or from the adapter itself, one tensor at a time, checked
against what it should hold before anybody sees it, and measured beside the trained model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import Keys

from longfit.errors import ExportError
from longfit.evaluation.drift import Drift, measure_drift, read_reference
from longfit.exporting.bitsandbytes_folder import write_bitsandbytes
from longfit.exporting.gguf_families import (
    STRING,
    Family,
    Field,
    extra_tensors,
    family_of,
    full_rope,
    metadata,
    rope_metadata,
    warnings_of,
)
from longfit.exporting.gguf_file import FILE_TYPES, carried_metadata, check_gguf, write_gguf
from longfit.exporting.gguf_lora import require_plain, write_lora
from longfit.exporting.gguf_tokenizer import require_rule, special_metadata, tokenizer_metadata
from longfit.exporting.held_out import held_out_windows
from longfit.exporting.merge import MergePlan, choose_device, drift_dtype, merge
from longfit.exporting.ollama import modelfile
from longfit.exporting.result_folder import require_new, result_folder
from longfit.exporting.trained import Trained, open_trained
from longfit.model.context import adopt_positions
from longfit.model.gguf import is_gguf
from longfit.model.load import load
from longfit.training.metrics import Event, OnEvent, ignore

FORMATS = ("gguf", "gguf-lora", "safetensors", "bnb-4bit")


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        out: the folder.
        files: in it, that the format consists of.
        format, type: as asked for; the type is empty where a format has none.
        onto: the base that the adapter was merged onto; empty for an adapter.
        drift: the trained model, its base without the adapter, the exported model; empty if not measured.
        text: what it was measured on.
        measured_in: dtype that the models computed in for it.
        commands: lines that use the result.
        warnings: what the user should know.
    """

    out: Path
    files: tuple[str, ...]
    format: str
    type: str
    onto: str
    drift: tuple[Drift, ...]
    text: str
    measured_in: str
    commands: tuple[str, ...]
    warnings: tuple[str, ...]


def export(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "gguf",
    type: str = "Q8_0",
    onto: str = "auto",
    checkpoint: str | None = None,
    base: str | None = None,
    ollama: bool = False,
    text: str | None = None,
    tokens: int = 2048,
    measure: bool = True,
    device: torch.device | None = None,
    on_event: OnEvent | None = None,
) -> ExportResult:
    """Write a run in another format.

    Args:
        source: a run directory, or an adapter folder.
        out: the folder to make; must not exist.
        format: ``"gguf"``, ``"gguf-lora"``, ``"safetensors"`` (as `merge`) or ``"bnb-4bit"``.
        type: of a GGUF file: F16, BF16, Q8_0 or Q4_0.
        onto: the base to merge onto, as for `merge`; ``"auto"`` is the one that the adapter was trained beside.
        checkpoint, base: as for `merge`.
        ollama: with gguf: write a Modelfile too.
        text, tokens, measure, device: of the drift, as for `merge`.
        on_event: called for everything worth showing.
    Raises: ExportError: the family cannot be written in that format (before any work), the file does not hold what was
            trained, ``out`` exists, or the disk is full. RunError, ModelError, DataError: as `merge`.
    """
    if format not in FORMATS:
        raise ExportError(f"format {format!r}: must be one of {', '.join(FORMATS)}")
    if format == "gguf" and type not in FILE_TYPES:
        raise ExportError(f"type {type!r}: must be one of {', '.join(FILE_TYPES)}")
    if ollama and format != "gguf":
        raise ExportError("ollama: a Modelfile goes with --format gguf")
    out, notify = Path(out), on_event or ignore
    require_new(out)
    trained = open_trained(source, checkpoint=checkpoint, base=base)
    if format == "gguf-lora":
        return _export_lora(trained, out)
    if format == "safetensors":
        made = merge(
            source,
            out,
            onto=onto,
            checkpoint=checkpoint,
            base=base,
            text=text,
            tokens=tokens,
            measure=measure,
            device=device,
            on_event=on_event,
        )
        return ExportResult(
            out,
            ("model.safetensors",),
            format,
            "",
            made.onto,
            made.drift,
            made.text,
            made.measured_in,
            (),
            made.warnings,
        )
    plan = MergePlan.of(trained, dtype=torch.float32)
    kind = plan.kind_of(onto)
    warnings: list[str] = []
    if format == "gguf":
        family = family_of(plan.config)
        fields, extra = gguf_metadata(plan, family), extra_tensors(plan.config)
    with result_folder(out, needed_bytes=plan.num_bytes) as folder:
        if format == "bnb-4bit":
            notify(Event("phase", f"quantising the model merged onto the {kind} base"))
            files = write_bitsandbytes(folder, plan, kind)
            opened = folder
            commands = [f'AutoModelForCausalLM.from_pretrained("{out}")  # transformers, with bitsandbytes installed']
        else:
            files = [f"{trained.path.resolve().name}-{type}.gguf"]
            opened = folder / files[0]
            notify(Event("phase", f"writing {files[0]}, merged onto the {kind} base"))
            weights = plan.weights(kind)
            shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
            about = {"family": family, "config": plan.config, "shapes": shapes}

            def make(name: str) -> torch.Tensor:
                return plan.make(name, weights)

            write_gguf(opened, fields=fields, make=make, extra=extra, file_type=type, **about)
            notify(Event("phase", "checking it, tensor by tensor"))
            check_gguf(opened, make=make, **about)
            warnings += warnings_of(plan.config, family)
            commands = [f"llama-cli -m {out / files[0]}"]
        if ollama:
            context = int(plan.config.max_position_embeddings)
            written, unsure = modelfile(files[0], trained.tokenizer(), context=context)
            (folder / "Modelfile").write_text(written, encoding="utf-8")
            files.append("Modelfile")
            warnings += unsure
            commands.append(f"ollama create {trained.path.resolve().name.lower()} -f {out / 'Modelfile'}")
        drift, name, computed_in = _measured(plan, opened, text, tokens, device, notify) if measure else ((), "", "")
        warnings += _drift_warnings(drift)
    return ExportResult(
        out=out,
        files=tuple(files),
        format=format,
        type=type if format == "gguf" else "nf4",
        onto=kind,
        drift=drift,
        text=name,
        measured_in=computed_in,
        commands=tuple(commands),
        warnings=tuple(warnings),
    )


def gguf_metadata(plan: MergePlan, family: Family) -> dict[str, Field]:
    """All metadata of the model's file; from a GGUF base its own, with the positions and the template of the run."""
    config, trained = plan.config, plan.trained
    name = {Keys.General.NAME: Field(trained.path.resolve().name, STRING)}
    tokenizer = trained.tokenizer()
    if not is_gguf(Path(trained.base)):
        made = tokenizer_metadata(tokenizer, config.vocab_size)
        require_rule(family, made)
        return name | metadata(config, family) | made
    fields = carried_metadata(Path(trained.base), family)
    changed = metadata(config, family)
    for key in (Keys.LLM.CONTEXT_LENGTH, *rope_metadata(config)):
        key = key.format(arch=family.architecture)
        fields.pop(key, None)
        if key in changed:
            fields[key] = changed[key]
    template = special_metadata(tokenizer).get(Keys.Tokenizer.CHAT_TEMPLATE)
    return fields | name | ({Keys.Tokenizer.CHAT_TEMPLATE: template} if template is not None else {})


def _export_lora(trained: Trained, out: Path) -> ExportResult:
    from transformers import AutoConfig

    from longfit.model.adapter_weights import AdapterWeights

    config = AutoConfig.from_pretrained(str(trained.adapter), trust_remote_code=False)
    family, adapter = family_of(config), AdapterWeights(trained.adapter)
    require_plain(adapter, str(trained.path))
    name = f"{trained.path.resolve().name}-lora.gguf"
    size = (trained.adapter / "adapter_model.safetensors").stat().st_size
    with result_folder(out, needed_bytes=size) as folder:
        write_lora(folder / name, adapter, family=family, config=config, name=trained.path.resolve().name)
    base = trained.base if trained.base.endswith(".gguf") else "BASE.gguf"
    flags = " ".join(_rope_flags(config))
    warnings = []
    if flags:
        warnings.append(f"a GGUF adapter does not carry the extended positions: start llama.cpp with {flags}")
    if base == "BASE.gguf":
        warnings.append(f"it needs {trained.base} as a GGUF file of your own; F16 is nearest to what was trained")
    command = f"llama-cli -m {base} --lora {out / name}" + (f" {flags}" if flags else "")
    return ExportResult(out, (name,), "gguf-lora", "", "", (), "", "", (command,), tuple(warnings))


def _rope_flags(config: object) -> list[str]:
    """llama.cpp's options for positions that a base's own file does not have."""
    rope = full_rope(config)
    if rope["rope_type"] not in ("yarn", "linear"):
        return []
    flags = ["--rope-scaling", rope["rope_type"], "--rope-scale", f"{rope['factor']:g}"]
    original = rope.get("original_max_position_embeddings")
    return [*flags, "--yarn-orig-ctx", str(original)] if rope["rope_type"] == "yarn" else flags


def _measured(
    plan: MergePlan, opened: Path, text: str | None, tokens: int, device: torch.device | None, notify: OnEvent
) -> tuple[tuple[Drift, ...], str, str]:
    """The trained model, its base without the adapter, and the exported one as longfit reads it back."""
    notify(Event("phase", "measuring the drift"))
    trained, device = plan.trained, choose_device(device)
    dtype = drift_dtype(plan, device)
    found = held_out_windows(trained, text, tokens)
    model, _ = trained.load(device, dtype=dtype)
    reference = read_reference(model, found.windows)
    rows = [measure_drift("as trained", model, reference)]
    with model.disable_adapter():
        rows.append(measure_drift("its base without the adapter", model, reference))
    del model
    model, _ = load(opened, quant="none" if opened.is_file() else "nf4", dtype=dtype, device=device)
    adopt_positions(model, trained.adapter)
    rows.append(measure_drift("exported", model, reference))
    return tuple(rows), found.name, str(dtype).removeprefix("torch.")


def _drift_warnings(drift: tuple[Drift, ...]) -> list[str]:
    if not drift or drift[2].kl < drift[1].kl:
        return []
    return [
        f"the exported model is as far from the trained one (KL {drift[2].kl:.2g}) as the base without its adapter (KL "
        f"{drift[1].kl:.2g}): its type loses more than training brought; use a finer --type, or train longer"
    ]
