"""Everything beside the weights that a model folder needs: configuration, generation settings, tokenizer, template.

Each of these, when it is lost, makes a good model speak badly: a lost chat template or end token makes it never stop,
lost RoPE settings make it speak nonsense beyond the native context.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from longfit.errors import ExportError
from longfit.exporting.trained import Trained
from longfit.files import checksums
from longfit.files.reading import reading
from longfit.model.vocabulary import FIRST_NEW_ROW

ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "config.json",
    "generation_config.json",
    "best.json",
    checksums.NAME,  # of the adapter's own files
)


def write_model_files(folder: Path, trained: Trained, config: Any, *, dtype: torch.dtype) -> None:
    """Write ``config.json``, ``generation_config.json`` and the run's tokenizer files into a folder."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    config.architectures = [_architecture(config)]
    for of_adapter in ("gguf_base", FIRST_NEW_ROW):  # an adapter needs to know its base; this model has none
        if hasattr(config, of_adapter):
            delattr(config, of_adapter)
    config.save_pretrained(str(folder))
    generation_config(trained, config).to_json_file(folder / "generation_config.json")
    for path in sorted(trained.adapter.iterdir()):
        if path.is_file() and path.name not in ADAPTER_FILES:
            shutil.copyfile(path, folder / path.name)


def generation_config(trained: Trained, config: Any) -> GenerationConfig:
    """The base's generation settings, or those that its configuration implies; the run's end token always ends."""
    path = Path(trained.base)
    if path.is_dir() and not (path / "generation_config.json").is_file():
        found = GenerationConfig.from_model_config(config)
    else:
        try:
            with reading(trained.base, "the base's generation settings", ExportError):
                found = GenerationConfig.from_pretrained(trained.base)
        except ExportError:  # a GGUF file, a base without them, or with damaged ones: they are not what was trained
            found = GenerationConfig.from_model_config(config)
    ends = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
    for ours in (*_ends_of(trained.adapter), trained.tokenizer().eos_token_id):
        if ours not in ends:
            ends.append(ours)
    ends = [int(end) for end in ends if end is not None]
    found.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    return found


def _ends_of(adapter: Path) -> list[int]:
    """The tokens at which a run's answers end, where its adapter says."""
    if not (adapter / "generation_config.json").is_file():
        return []
    with reading(
        adapter / "generation_config.json", "the adapter's generation settings", ExportError, do="copy it again"
    ):
        ends = GenerationConfig.from_pretrained(str(adapter)).eos_token_id
    return ends if isinstance(ends, list) else [ends]


def _architecture(config: Any) -> str:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)
