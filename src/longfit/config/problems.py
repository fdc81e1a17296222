"""How mistakes in settings are told: one line each with what, got, allowed and do, and never only the first of them."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from longfit.config.sections import SECTIONS, known_keys
from longfit.config.source import Given

# What other trainers call our settings, so that the error can say the right name.
FOREIGN_NAMES = {
    "attn_implementation": "context.attention",
    "base_model": "model.name",
    "bnb_4bit_quant_type": "model.quant",
    "bnb_4bit_use_double_quant": "model.double_quant",
    "cutoff_len": "context.context",
    "dataset": "data.path",
    "datasets": "data.path",
    "eval_steps": "train.eval_every",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_r": "adapter.rank",
    "lora_target": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "max_length": "context.context",
    "max_seq_length": "context.context",
    "max_steps": "train.steps",
    "micro_batch_size": "train.batch_size",
    "model_max_length": "context.context",
    "model_name_or_path": "model.name",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "output_dir": "output.run_dir",
    "per_device_train_batch_size": "train.batch_size",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "sequence_len": "context.context",
    "target_modules": "adapter.targets",
    "torch_dtype": "model.dtype",
    "train_turns": "data.train_on",
}

# What longfit called its settings before.
RENAMED = {
    "engine.arena": "engine.offload",
    "engine.arena_folder": "engine.offload_folder",
    "engine.keep_attention": "engine.saved_attention",
}

_MISSING = {
    "model.name": "no base model given: longfit train MODEL DATA",
    "data.path": "no data given: longfit train MODEL DATA",
}


def unknown_key(item: Given) -> str:
    """Describe a key that does not exist, and name the one that was probably meant."""
    if item.key in SECTIONS:
        first = next(iter(SECTIONS[item.key].model_fields))
        return f"{item}: a section holds `key: value` lines; did you mean {item.key}.{first}?"
    if item.key in RENAMED:
        return f"{item.origin}: {item.key} is called {RENAMED[item.key]} now; write {RENAMED[item.key]}={item.value}"
    guess = nearest_key(item.key)
    advice = f"did you mean {guess}?" if guess else f"the sections are {', '.join(SECTIONS)}"
    return f"{item.origin}: unknown key {item.key}; {advice}"


def nearest_key(key: str) -> str | None:
    """Return the known key that was meant: another trainer's name, the same name elsewhere, or a near spelling."""
    name = key.rpartition(".")[2].replace("-", "_")
    if name in FOREIGN_NAMES:
        return FOREIGN_NAMES[name]
    by_name = {known.partition(".")[2]: known for known in reversed(known_keys())}
    if name in by_name:
        return by_name[name]
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.75)
    near += [by_name[close] for close in difflib.get_close_matches(name, by_name, n=1)]
    return near[0] if near else None


def wrong_values(section: str, errors: list[Any], latest: Mapping[str, Given]) -> list[str]:
    """Describe pydantic's errors about one section, one line a setting.

    Args:
        section: name of the section.
        errors: what ``ValidationError.errors()`` returned.
        latest: the values that were validated, by dotted key.
    """
    rules: dict[str, list[str]] = {}
    advice: dict[str, str] = {}
    for error in errors:
        if error["type"] == "together":
            origins = sorted({item.origin for key, item in latest.items() if key.startswith(f"{section}.")})
            rules.setdefault(f"{section} ({', '.join(origins)})", []).append(error["msg"])
            continue
        key = f"{section}.{error['loc'][0]}"
        if error["type"] == "missing" and len(error["loc"]) == 1:
            rules.setdefault(_MISSING[key], [])
            continue
        item = latest[key]
        rules.setdefault(str(item), []).append(_rule(error["msg"]))
        if better := _better_value(error, item):
            advice[str(item)] = f"; try {item.spelt(better)}"
    return [f"{what}{': ' * bool(rule)}{' or '.join(rule)}{advice.get(what, '')}" for what, rule in rules.items()]


def _rule(message: str) -> str:
    """Shorten pydantic's sentence to the rule that was broken."""
    message = message.replace("Input should be a valid integer", "must be a whole number")
    message = message.replace("Input should be a valid", "must be a").replace("Input should be", "must be")
    message = message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    return message.partition(", unable to")[0].partition(", got")[0]


def _better_value(error: Any, item: Given) -> object:
    context = error.get("ctx", {})
    if error["type"] != "literal_error":
        return context.get("fix")
    allowed = re.findall(r"'([^']*)'", str(context["expected"]))
    near = difflib.get_close_matches(str(item.value), allowed, n=1, cutoff=0.5)
    return near[0] if near else None
