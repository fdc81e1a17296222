"""A model without its weights: its configuration and its tokenizer, of a folder, a hub id or a ``.gguf`` file.

What this is not: ``load.py``, which needs PEFT and the kernels. What counts tokens needs neither, and starts without.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig

from longfit.compat.transformers import forget_kernels
from longfit.errors import ModelError
from longfit.files import reading as border
from longfit.files.reading import read_object, reading
from longfit.model import gguf
from longfit.model.weight_files import require_sane_counts

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
NEITHER = "neither a model folder, nor a .gguf file, nor a reachable hub id"


def read_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer of a folder, hub id or ``.gguf`` file.

    Raises: ModelError: there is none, or it is damaged.
    """
    if gguf.is_gguf(Path(name)):
        return gguf.read_tokenizer(Path(name))
    with reading(name, "the tokenizer", ModelError, do="fetch its files again, or give a model that has one"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def read_config(name: str | os.PathLike[str]) -> PretrainedConfig:
    """The configuration of a causal language model at a folder or hub id, or in a ``.gguf`` file.

    Raises: ModelError: there is none, it is damaged, or it describes another kind of model.
    """
    if gguf.is_gguf(Path(name)):
        return gguf.read_config(Path(name))
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        found = sorted(entry.name for entry in Path(name).iterdir())[:5]
        raise ModelError(
            f"{name}: no config.json in this folder (found {', '.join(found) or 'nothing'}); give a model folder"
        )
    if not Path(name).exists() and not HUB_ID.fullmatch(str(name)):
        raise ModelError(f"{name}: does not exist, and is no hub id; give a model folder, a .gguf file or a hub id")
    if Path(name).is_dir():
        require_sane_counts(str(name), read_object(Path(name) / "config.json", ModelError, what="the configuration"))
    try:
        if not Path(name).is_dir():
            require_sane_counts(str(name), PretrainedConfig.get_config_dict(name)[0])
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        place = Path(name) / "config.json" if Path(name).is_dir() else name
        known = "not a configuration that transformers can read" if Path(name).is_dir() else NEITHER
        raise ModelError(f"{place}: {known} ({border.reason(error)}); fetch it again, or give another model") from error
    forget_kernels(config)  # a file does not choose them
    if getattr(config, "transformers_weights", None) is not None:
        raise ModelError(
            f"{name}: config.json names a file of weights (transformers_weights); longfit reads model.safetensors or "
            "what its index names: rename the file, and take the key out"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{name}: a {config.model_type} model is not a causal language model; longfit trains decoders only"
        )
    return config
