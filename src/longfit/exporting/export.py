"""Hand a run on in the format that somebody else reads: GGUF, a GGUF adapter, safetensors, bitsandbytes' 4 bits.

Every format is made from the merged tensors (merge.py) or from the adapter itself, one tensor at a time, checked
against what it should hold before anybody sees it, and measured beside the trained model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import Keys

from longfit.config import RunConfig
from longfit.errors import ExportError
from longfit.evaluation.drift import Drift
from longfit.exporting.bitsandbytes_folder import rounded, write_bitsandbytes
from longfit.exporting.gguf_families import (
    STRING,
    GgufFamily,
    GgufField,
    extra_tensors,
    family_of,
    full_rope,
    metadata,
    rope_metadata,
    warnings_of,
)
from longfit.exporting.gguf_file import (
    FILE_TYPES,
    LEVELS,
    carried_metadata,
    check_gguf,
    decode,
    encode,
    stored_type,
    tensor_names,
    write_gguf,
)
from longfit.exporting.gguf_lora import check_lora, require_plain, take_over, write_lora
from longfit.exporting.gguf_tokenizer import require_rule, special_metadata, tokenizer_metadata
from longfit.exporting.measuring import DriftTable
from longfit.exporting.merge import DTYPES, merge
from longfit.exporting.merge_plan import MergePlan
from longfit.exporting.ollama import modelfile
from longfit.exporting.proof import Proof
from longfit.exporting.result_folder import require_new, result_folder
from longfit.exporting.trained import Trained, open_trained
from longfit.model.gguf import is_gguf
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
        proof: how far the exported model is from what it should hold; None if not measured.
        text: what it was measured on, and in which dtype.
        commands: lines that use the result.
        warnings: what the user should know.
    """

    out: Path
    files: tuple[str, ...]
    format: str
    type: str
    onto: str
    drift: tuple[Drift, ...]
    proof: Proof | None
    text: str
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
    dtype: str | None = None,
    ollama: bool = False,
    text: str | None = None,
    tokens: int = 2048,
    measure: bool = True,
    device: torch.device | None = None,
    config: RunConfig | None = None,
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
        dtype: of the tensors that stay unquantised, in safetensors and bnb-4bit; default what the run computed in.
        config: as for `merge`.
        on_event: called for everything worth showing.
    Raises: ExportError: the family cannot be written in that format (before any work), the file does not hold what
            was trained or is not the trained model, ``out`` exists, or the disk is full. RunError, ModelError,
            DataError: as `merge`.
    """
    if format not in FORMATS:
        raise ExportError(f"format {format!r}: must be one of {', '.join(FORMATS)}")
    if format == "gguf" and type not in FILE_TYPES:
        raise ExportError(f"type {type!r}: must be one of {', '.join(FILE_TYPES)}")
    if ollama and format != "gguf":
        raise ExportError("ollama: a Modelfile goes with --format gguf")
    if dtype is not None and format.startswith("gguf"):
        raise ExportError("dtype: what a GGUF file holds is its type; use --type BF16, or drop --dtype")
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    out, notify = Path(out), on_event or ignore
    require_new(out)
    trained = open_trained(source, checkpoint=checkpoint, base=base, config=config)
    if format == "gguf-lora":
        return _export_lora(trained, out, Measuring(text, tokens, device, notify) if measure else None)
    if format == "safetensors":
        made = merge(
            source,
            out,
            onto=onto,
            checkpoint=checkpoint,
            base=base,
            dtype=dtype,
            config=config,
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
            made.proof,
            made.text,
            (),
            made.warnings,
        )
    plan = MergePlan.of(trained, dtype=torch.float32)
    kind = plan.kind_of(onto)
    written: GgufExport | BitsandbytesExport
    if format == "gguf":
        written = GgufExport(plan, kind, out, type, ollama=ollama)
    else:
        written = BitsandbytesExport(plan, kind, out, DTYPES[dtype] if dtype else trained.compute_dtype)
    with result_folder(out, needed_bytes=plan.num_bytes) as folder:
        opened = written.write(folder, notify)
        table, proof, warnings = None, None, list(written.warnings)
        if measure:
            table = DriftTable.begin(trained, text, tokens, device, notify)
            said = table.add("exported", opened, quant=written.quant)
            proof = table.prove(plan, said, kind, written.rounding, levels=written.levels)
            proof.require(str(out))
            warnings += table.warnings("exported", written.advice)
    return ExportResult(
        out=out,
        files=tuple(written.files),
        format=format,
        type=written.type,
        onto=kind,
        drift=() if table is None else tuple(table.rows),
        proof=proof,
        text="" if table is None else table.about,
        commands=tuple(written.commands),
        warnings=tuple(warnings),
    )


class GgufExport:
    """A GGUF file, and a Modelfile if one is asked for; what cannot be written is refused where this is made."""

    quant, advice = "none", "use a finer --type, or train longer"

    def __init__(self, plan: MergePlan, kind: str, out: Path, type: str, *, ollama: bool) -> None:
        self.plan, self.kind, self.out, self.type, self.ollama = plan, kind, out, type, ollama
        self.family = family_of(plan.config)
        self.fields, self.extra = gguf_metadata(plan, self.family), extra_tensors(plan.config)
        self.shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
        self.names = tensor_names(self.shapes, plan.config, self.family)
        name = plan.trained.path.resolve().name
        self.files, self.warnings = [f"{name}-{type}.gguf"], warnings_of(plan.config, self.family)
        self.commands = [f"llama-cli -m {out / self.files[0]}"]
        self.levels = LEVELS[type]

    def write(self, folder: Path, notify: OnEvent) -> Path:
        """Write it and read every tensor back; returns the file."""
        plan, path = self.plan, folder / self.files[0]
        notify(Event("phase", f"writing {path.name}, merged onto the {self.kind} base"))
        weights = plan.weights(self.kind)
        about: dict[str, Any] = {"family": self.family, "config": plan.config, "shapes": self.shapes}

        def make(name: str) -> torch.Tensor:
            return plan.make(name, weights)

        write_gguf(path, fields=self.fields, make=make, extra=self.extra, file_type=self.type, **about)
        notify(Event("phase", "checking it, tensor by tensor"))
        check_gguf(path, make=make, **about)
        if self.ollama:
            context = int(plan.config.max_position_embeddings)
            text, unsure = modelfile(path.name, plan.trained.tokenizer(), context=context)
            (folder / "Modelfile").write_text(text, encoding="utf-8")
            self.files.append("Modelfile")
            self.warnings += unsure
            name = plan.trained.path.resolve().name.lower()
            self.commands.append(f"ollama create {name} -f {self.out / 'Modelfile'}")
        return path

    def rounding(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight as the file's type holds it."""
        kind = stored_type(self.names[name], tuple(weight.shape), self.type)
        return decode(encode(weight.float().cpu(), kind), kind).reshape(weight.shape)


class BitsandbytesExport:
    """A folder that opens in transformers with bitsandbytes."""

    quant, type, levels, advice = "nf4", "nf4", 127, "merge it instead, or train longer"

    def __init__(self, plan: MergePlan, kind: str, out: Path, dtype: torch.dtype) -> None:
        self.plan, self.kind, self.dtype, self.files = plan, kind, dtype, list[str]()
        self.warnings: list[str] = []
        self.commands = [f'AutoModelForCausalLM.from_pretrained("{out}")  # transformers, with bitsandbytes installed']

    def write(self, folder: Path, notify: OnEvent) -> Path:
        """Write it; returns the folder."""
        notify(Event("phase", f"quantising the model merged onto the {self.kind} base"))
        self.files += write_bitsandbytes(folder, self.plan, self.kind, dtype=self.dtype)
        return folder

    def rounding(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight as the folder holds it."""
        return rounded(name, weight, self.plan, dtype=self.dtype)


def gguf_metadata(plan: MergePlan, family: GgufFamily) -> dict[str, GgufField]:
    """All metadata of the model's file; from a GGUF base its own, with the positions and the template of the run."""
    config, trained = plan.config, plan.trained
    name = {Keys.General.NAME: GgufField(trained.path.resolve().name, STRING)}
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


@dataclass(frozen=True)
class Measuring:
    """How an export is measured: as the arguments of `export`."""

    text: str | None
    tokens: int
    device: torch.device | None
    on_event: OnEvent


def _export_lora(trained: Trained, out: Path, measuring: Measuring | None) -> ExportResult:
    from longfit.model.adapter_weights import AdapterWeights
    from longfit.model.description import read_config

    config = read_config(trained.adapter)
    family, adapter = family_of(config), AdapterWeights(trained.adapter)
    require_plain(adapter, str(trained.path))
    name = f"{trained.path.resolve().name}-lora.gguf"
    size = (trained.adapter / "adapter_model.safetensors").stat().st_size
    with result_folder(out, needed_bytes=size) as folder:
        write_lora(folder / name, adapter, family=family, config=config, name=trained.path.resolve().name)
        updates = check_lora(folder / name, adapter, config)
        table, proof = None, None
        if measuring is not None:
            table = DriftTable.begin(trained, measuring.text, measuring.tokens, measuring.device, measuring.on_event)
            proof = table.prove_adapter(lambda model: take_over(model, updates))
            proof.require(str(out))
    base = trained.base if trained.base.endswith(".gguf") else "BASE.gguf"
    flags = " ".join(_rope_flags(config))
    warnings = []
    if flags:
        warnings.append(f"a GGUF adapter does not carry the extended positions: start llama.cpp with {flags}")
    if base == "BASE.gguf":
        warnings.append(f"it needs {trained.base} as a GGUF file of your own; F16 is nearest to what was trained")
    elif trained.quant != "none":
        warnings.append(
            f"trained and proven on the base in {trained.quant}; llama.cpp puts it on the file's own weights, another "
            "model by as much as longfit merge shows for 16bit; a GGUF of the merged model is the trained one"
        )
    command = f"llama-cli -m {base} --lora {out / name}" + (f" {flags}" if flags else "")
    drift, about = ((), "") if table is None else (tuple(table.rows), table.about)
    return ExportResult(out, (name,), "gguf-lora", "", "", drift, proof, about, (command,), tuple(warnings))


def _rope_flags(config: object) -> list[str]:
    """llama.cpp's options for positions that a base's own file does not have."""
    rope = full_rope(config)
    if rope["rope_type"] not in ("yarn", "linear"):
        return []
    flags = ["--rope-scaling", rope["rope_type"], "--rope-scale", f"{rope['factor']:g}"]
    original = rope.get("original_max_position_embeddings")
    return [*flags, "--yarn-orig-ctx", str(original)] if rope["rope_type"] == "yarn" else flags
