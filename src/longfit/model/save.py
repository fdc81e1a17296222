"""Save what was trained so that plain transformers and PEFT load it, and load it back.

An adapter folder holds PEFT's two files, the tokenizer, and ``config.json``: the base model's configuration with the
extended RoPE settings, which a PEFT adapter cannot carry itself. Without longfit it is loaded like this:

    config = AutoConfig.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(base_name, config=config)
    model = PeftModel.from_pretrained(base, folder)
"""

from __future__ import annotations

import copy
import os
from collections.abc import Set
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from longfit.errors import ModelError
from longfit.files import checksums
from longfit.files.reading import read_object, reading
from longfit.model.accounting import is_finite, not_finite
from longfit.model.adapter_patterns import require_quick_patterns
from longfit.model.adapters import register_layers
from longfit.model.weight_files import ADAPTER, read_adapter_header


def save_adapter(
    model: PeftModel, tokenizer: Any, path: str | os.PathLike[str], *, trained: dict[str, Tensor] | None = None
) -> Path:
    """Write adapter, tokenizer and extended configuration into a folder.

    Args:
        trained: the trained tensors by parameter name, where the model has only rows of them.
    Returns: the folder.
    Raises: ModelError: ``model`` has no adapter.
    """
    if not isinstance(model, PeftModel):
        raise ModelError("save_adapter: this model has no adapter; pass the model that add_adapters returned")
    folder = Path(path)
    # Embeddings that train are in modules_to_save.
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=trained)
    tokenizer.save_pretrained(str(folder))
    base = model.get_base_model()
    plain_config(base.config).save_pretrained(str(folder))
    generation = base.generation_config
    if generation is not None:  # where answers end; how they are drawn is for who asks
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        GenerationConfig(**{name: getattr(generation, name) for name in names}).save_pretrained(str(folder))
    return folder


def restore_chat(model: Any, tokenizer: Any, path: str | os.PathLike[str]) -> None:
    """Give a base model and its tokenizer what an adapter was trained with: chat template, tokens that end answers."""
    template, generation = Path(path) / "chat_template.jinja", Path(path) / "generation_config.json"
    with reading(path, "the adapter", ModelError, do="copy it again"):
        if template.is_file():
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        if generation.is_file() and model.generation_config is not None:
            model.generation_config.eos_token_id = GenerationConfig.from_pretrained(str(path)).eos_token_id


def load_adapter(model: Any, path: str | os.PathLike[str], *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on a base model whose positions have already been extended.

    Raises: ModelError: no adapter at ``path``, a damaged one, one of another model, or the RoPE settings it was trained
        with are not those of ``model``.
    """
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: no adapter_config.json; give the adapter folder of a run")
    held = read_adapter_header(folder).keys()
    # Whoever publishes an adapter writes a README of his own.
    if (folder / checksums.NAME).is_file() and (found := checksums.folder_damage(folder, ignore=("README.md",))):
        raise ModelError(f"{folder}: {'; '.join(found[:3])}; copy it again, or resume its run, which writes it again")
    with reading(folder, "the adapter", ModelError, do="copy it again (--debug shows where it failed)"):
        require_same_positions(model.config, folder)
        said = read_object(
            folder / "adapter_config.json", ModelError, what="the adapter's configuration", do="copy it again"
        )
        require_quick_patterns(said, folder)
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise ModelError(f"{folder}: a {config.peft_type} adapter; longfit reads LoRA adapters")
        register_layers(config, model)
        adapted = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=trainable)
        _require_complete(adapted, folder, held)
    return adapted


def _require_complete(model: PeftModel, folder: Path, held: Set[str]) -> None:
    """Raise ModelError unless every tensor ``held`` by the file was read, none is left over, and all are finite."""
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    for what, names in (("lacks", expected - held), ("has what this model has not:", held - expected)):
        if names:
            raise ModelError(f"{folder / ADAPTER}: {what} {min(names)} ({len(names)} in all); copy it again")
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")) and not is_finite(
            parameter
        ):
            raise ModelError(not_finite(str(folder), name))


def require_same_positions(config: PretrainedConfig, folder: Path) -> None:
    """An adapter trained at other positions gives fluent nonsense, so refuse it."""
    if not (folder / "config.json").is_file():
        return
    trained = AutoConfig.from_pretrained(str(folder))
    for key in ("rope_parameters", "max_position_embeddings"):
        expected, got = getattr(trained, key, None), getattr(config, key, None)
        if expected != got:
            raise ModelError(
                f"{folder}: trained with {key} = {expected}, but this model has {got}; "
                "extend the model's context as the run did, or load it with the config.json of this folder"
            )


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the dense base: what quantisation added is taken out."""
    plain = copy.deepcopy(config)
    if getattr(plain, "quantization_config", None) is not None:
        del plain.quantization_config
    return plain
