"""What is handed on: a run, or an adapter folder made with the library, with all that decides its model.

Two folders can be named. A run knows its base, the data type that the base was trained in, and its text. An adapter
folder knows the base by name only; the data type is then longfit's default unless it is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longfit.config import RunConfig
from longfit.errors import ExportError
from longfit.files.reading import read_object
from longfit.model.compute_dtype import compute_in
from longfit.model.context import adopt_positions
from longfit.model.description import read_config, read_tokenizer
from longfit.model.load import load
from longfit.model.save import load_adapter
from longfit.model.vocabulary import added_rows
from longfit.training import run_directory


@dataclass(frozen=True)
class Trained:
    """A trained model that is still a base and an adapter.

    Attributes:
        path: the run or the adapter folder, as it was named.
        adapter: folder with PEFT's files, tokenizer and the configuration with the positions trained at.
        base: folder, hub id or ``.gguf`` file.
        quant, double_quant, block_size: what the base's linear layers were in while the adapter was trained.
        compute_dtype: of the training.
        config: of the run; None for an adapter folder.
        int8_modules: layers that were in 8 bits in a base of 4.
        int8_threshold: of LLM.int8().
    """

    path: Path
    adapter: Path
    base: str
    quant: str
    double_quant: bool
    block_size: int
    compute_dtype: torch.dtype
    config: RunConfig | None = None
    int8_modules: tuple[str, ...] = ()
    int8_threshold: float | None = None

    def load(self, device: torch.device, *, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
        """The model as it was trained, in eval mode, and its tokenizer; ``dtype`` to compute in another.

        A base in few bits has the weights that it had in the run: what was rounded to the run's dtype before it was
        quantised, or beside what was, stays rounded, whatever computes.
        """
        wanted = dtype or self.compute_dtype
        model, _ = load(
            self.base,
            quant=self.quant,
            double_quant=self.double_quant,
            block_size=self.block_size,
            int8_modules=list(self.int8_modules) or None,
            int8_threshold=self.int8_threshold,
            dtype=wanted if self.quant == "none" else self.compute_dtype,
            device=device,
            resize_embeddings=bool(added_rows(read_config(self.adapter))),
        )
        compute_in(model, wanted)
        adopt_positions(model, self.adapter)
        return load_adapter(model, self.adapter).eval(), self.tokenizer()

    def tokenizer(self) -> Any:
        """The tokenizer that the run trained with, chat template included."""
        return read_tokenizer(self.adapter)


def open_trained(
    path: str | Path, *, checkpoint: str | None = None, base: str | None = None, config: RunConfig | None = None
) -> Trained:
    """Find base and adapter of a run or of an adapter folder.

    Args:
        path: a run directory, or a folder with ``adapter_config.json``.
        checkpoint: of a run: ``"last"``, or the name of a folder below ``checkpoints/``; default: the run's result.
        base: where the base is now, if it has moved.
        config: of a run, with changes to how its text is read; None for its own.
    Raises: ExportError: neither, or a base that is not there. RunError: nothing saved yet, or no such checkpoint.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        return _adapter_folder(path, base)
    if not (path / "config.yaml").is_file():
        what = "no such folder" if not path.exists() else "neither a run (config.yaml) nor an adapter folder"
        raise ExportError(f"{path}: {what}; give the directory of a run, as longfit runs lists them")
    config = config or run_directory.read_config(path)
    section = config.model
    return Trained(
        path=path,
        adapter=run_directory.find_adapter(path, checkpoint),
        base=_require_base(base or section.name, path),
        quant=section.quant,
        double_quant=section.double_quant,
        block_size=section.block_size,
        compute_dtype=torch.bfloat16 if section.dtype == "auto" else getattr(torch, section.dtype),
        config=config,
        int8_modules=tuple(section.int8_modules or ()),
        int8_threshold=section.int8_threshold,
    )


def _adapter_folder(path: Path, base: str | None) -> Trained:
    settings = read_object(path / "adapter_config.json", ExportError, what="the adapter's configuration")
    name = base or settings.get("base_model_name_or_path")
    if not name:
        raise ExportError(f"{path}: its adapter_config.json names no base; give it with --base")
    return Trained(path, path, _require_base(str(name), path), "nf4", True, 64, torch.bfloat16)


def _require_base(name: str, path: Path) -> str:
    """Refuse a base that is clearly a path and not there."""
    is_path = Path(name).is_absolute() or name.endswith(".gguf") or name.startswith(".")
    if is_path and not Path(name).exists():
        raise ExportError(f"{path}: its base {name} is not there any more; say where it is with --base PATH")
    return name
