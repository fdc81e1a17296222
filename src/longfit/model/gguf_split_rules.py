"""How a byte-level tokenizer splits a text before it merges: the rule behind a name that is all a GGUF file says.

``tokenizer.ggml.pre`` names the rule, llama.cpp knows it by that name, and transformers does not read it: it splits as
GPT-2 did, or as the architecture usually does. Another rule gives other tokens without a word. So the names that are
known here get their own rule, and the others are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

from longfit.errors import ModelError

WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
REST = " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
REST_SLASH = REST.replace("[\\r\\n]*", "[\\r\\n/]*", 1)
CASED = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
    "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
)


@dataclass(frozen=True)
class SplitRule:
    """What a byte-level tokenizer does to a text before it merges: regular expressions, digits, the GPT-2 rule."""

    patterns: tuple[str, ...] = ()
    single_digits: bool = False
    gpt2: bool = False
    ignore_merges: bool = False


PRE_NAMES = {
    SplitRule(gpt2=True): "gpt-2",
    SplitRule(single_digits=True, gpt2=True): "smollm",
    SplitRule((f"{WORDS}|\\p{{N}}{{1,3}}|{REST}",), ignore_merges=True): "llama-bpe",
    SplitRule((f"{WORDS}|\\p{{N}}|{REST}",)): "qwen2",
    SplitRule((f"{CASED}|\\p{{N}}|{REST_SLASH}",), ignore_merges=True): "tekken",
}
"""llama.cpp's names for rules, each the rule of a published tokenizer (Meta-Llama-3, Qwen2, SmolLM, Mistral-Nemo)."""

RULES = {name: rule for rule, name in PRE_NAMES.items()}


def steps_of(part: dict[str, Any] | None, plural: str) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer's JSON: none, one, or those of a sequence."""
    if part is None:
        return []
    return list(part[plural]) if part["type"] == "Sequence" else [part]


def split_rule(backend: dict[str, Any]) -> tuple[SplitRule, list[str]]:
    """Read the rule of a byte-level tokenizer from its JSON, and the kinds of steps in it that no rule has."""
    patterns, digits, gpt2 = [], False, False
    unknown = [step["type"] for step in steps_of(backend["normalizer"], "normalizers") if step["type"] != "NFC"]
    for step in steps_of(backend["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            digits = True
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            gpt2 = gpt2 or bool(step["use_regex"])
        else:
            unknown.append(step["type"])
    return SplitRule(tuple(patterns), digits, gpt2, bool(backend["model"].get("ignore_merges"))), unknown


def follow_rule(tokenizer: Any, keys: dict[str, Any], name: str) -> None:
    """Let a tokenizer that was read from a GGUF file split as the file says.

    Args:
        tokenizer: transformers' fast tokenizer.
        keys: of the file's header.
        name: of the file, for the message.
    Raises: ModelError: byte-level, and its rule is not named, or not known.
    """
    if keys.get("tokenizer.ggml.model") != "gpt2":
        return
    named = keys.get("tokenizer.ggml.pre")
    if named not in RULES:
        raise ModelError(
            f"{name}: tokenizer.ggml.pre is {named!r}: known are {', '.join(sorted(RULES))}; another rule would make "
            "other tokens of the same text: give the safetensors of the model"
        )
    rule, backend = RULES[named], tokenizer.backend_tokenizer
    if split_rule(json.loads(backend.to_str())) == (rule, []):
        return
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    if rule.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.gpt2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.model.ignore_merges = rule.ignore_merges
