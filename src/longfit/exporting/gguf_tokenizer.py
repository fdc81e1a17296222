"""A tokenizer as GGUF metadata, so that llama.cpp makes the same tokens of the same text.

Two kinds exist among the families that can be exported. Byte-level BPE ("gpt2"): tokens, merges, and the name of the
rule that splits a text before it is merged. That rule is not in the file, llama.cpp knows it by name only, and an
unknown or wrong name gives other tokens without a word. So the name follows from the tokenizer's own rule, compared
whole; one that has no known name is refused. SentencePiece BPE ("llama"): tokens and scores, the better
score merges first.
"""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFValueType, Keys, TokenType

from longfit.errors import ExportError
from longfit.exporting.chat_format import ChatFormat, chat_format
from longfit.exporting.gguf_families import BOOL, F32, STRING, U32, GgufFamily, GgufField
from longfit.model.gguf_split_rules import PRE_NAMES, split_rule, steps_of

ARRAY, I32 = GGUFValueType.ARRAY, GGUFValueType.INT32


def tokenizer_metadata(tokenizer: Any, vocab_size: int) -> dict[str, GgufField]:
    """All ``tokenizer.*`` fields.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocab_size: rows of the embedding; rows without a token become unused ones.
    Raises: ExportError: a kind of tokenizer that llama.cpp does not have, or more tokens than rows.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ExportError(f"tokenizer: a {model['type']} tokenizer; GGUF is written for BPE ones")
    if len(tokenizer) > vocab_size:
        raise ExportError(f"tokenizer: {len(tokenizer):,} tokens, the embedding has {vocab_size:,} rows")
    tokens, kinds = _tokens(backend, vocab_size)
    if _is_byte_level(backend):
        fields = _byte_level(backend)
    else:
        fields = _sentencepiece(backend, tokens, kinds)
    fields[Keys.Tokenizer.LIST] = GgufField(tokens, ARRAY, STRING)
    fields[Keys.Tokenizer.TOKEN_TYPE] = GgufField([int(kind) for kind in kinds], ARRAY, I32)
    return fields | special_metadata(tokenizer)


def require_rule(family: GgufFamily, fields: dict[str, GgufField]) -> None:
    """Raise ExportError for an architecture whose texts llama.cpp splits by one rule, whatever the file says."""
    pre = fields[Keys.Tokenizer.PRE].value
    if family.architecture == "qwen2" and pre != "qwen2":
        raise ExportError(
            f"tokenizer: it splits texts by the rule {pre!r}, but llama.cpp splits those of all qwen2 models by 'qwen2'"
        )


def special_metadata(tokenizer: Any) -> dict[str, GgufField]:
    """Special tokens, whether a text begins and ends with them, the chat template and the token that ends a turn."""
    keys = {
        Keys.Tokenizer.BOS_ID: tokenizer.bos_token_id,
        Keys.Tokenizer.EOS_ID: tokenizer.eos_token_id,
        Keys.Tokenizer.UNK_ID: tokenizer.unk_token_id,
        Keys.Tokenizer.PAD_ID: tokenizer.pad_token_id,
    }
    fields = {key: GgufField(int(token), U32) for key, token in keys.items() if token is not None}
    made = tokenizer("a").input_ids
    fields[Keys.Tokenizer.ADD_BOS] = GgufField(bool(made and made[0] == tokenizer.bos_token_id), BOOL)
    fields[Keys.Tokenizer.ADD_EOS] = GgufField(bool(made and made[-1] == tokenizer.eos_token_id), BOOL)
    if isinstance(tokenizer.chat_template, str):
        fields[Keys.Tokenizer.CHAT_TEMPLATE] = GgufField(tokenizer.chat_template, STRING)
        turn_end = end_of_turn(tokenizer, chat_format(tokenizer))
        if turn_end is not None and turn_end != tokenizer.eos_token_id:
            fields[Keys.Tokenizer.EOT_ID] = GgufField(turn_end, U32)
    return fields


def end_of_turn(tokenizer: Any, found: ChatFormat | None) -> int | None:
    """The token that the template puts behind an answer, if it is a single special one."""
    if found is None or not found.assistant[1].strip():
        return None
    ids = tokenizer(found.assistant[1], add_special_tokens=False).input_ids
    return int(ids[0]) if ids and ids[0] in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder) else None


def _tokens(backend: dict[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    for token, index in backend["model"]["vocab"].items():
        tokens[index], kinds[index] = token, TokenType.NORMAL
    for added in backend["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return tokens, kinds


# ------------------------------------------------------------------------------------------------ byte-level BPE
def _is_byte_level(backend: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in steps_of(backend["pre_tokenizer"], "pretokenizers"))


def _byte_level(backend: dict[str, Any]) -> dict[str, GgufField]:
    if not backend["model"]["merges"]:
        raise ExportError(
            "tokenizer: byte-level BPE without a single merge, one token a byte; a GGUF file cannot say so. Use longfit"
            " merge, or longfit export --format gguf-lora"
        )
    return {
        Keys.Tokenizer.MODEL: GgufField("gpt2", STRING),
        Keys.Tokenizer.PRE: GgufField(pre_name(backend), STRING),
        Keys.Tokenizer.MERGES: GgufField([_merge_text(merge) for merge in backend["model"]["merges"]], ARRAY, STRING),
    }


def _merge_text(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def pre_name(backend: dict[str, Any]) -> str:
    """llama.cpp's name for the rule of a byte-level tokenizer.

    Raises: ExportError: it has none that is known here.
    """
    rule, unknown = split_rule(backend)
    if unknown or rule not in PRE_NAMES:
        raise ExportError(
            f"tokenizer: it splits texts by {', '.join(unknown) or rule}, for which longfit knows no name of "
            "llama.cpp's; merge the model with longfit merge and use llama.cpp's own converter"
        )
    return PRE_NAMES[rule]


# ------------------------------------------------------------------------------------------------ SentencePiece BPE
def _sentencepiece(backend: dict[str, Any], tokens: list[str], kinds: list[TokenType]) -> dict[str, GgufField]:
    """Tokens with scores; ``kinds`` learns which are bytes and which is unknown."""
    model = backend["model"]
    if not model.get("byte_fallback"):
        raise ExportError(
            "tokenizer: BPE that is neither byte-level nor falls back to bytes; llama.cpp has no such kind"
        )
    rank: dict[str, int] = {}
    for index, merge in enumerate(model["merges"]):
        rank.setdefault(_merge_text(merge).replace(" ", ""), index)
    scores = [-float(rank.get(token, len(rank))) for token in tokens]
    for index, token in enumerate(tokens):
        if kinds[index] == TokenType.NORMAL and len(token) == 6 and token.startswith("<0x"):
            kinds[index] = TokenType.BYTE
        elif token == model.get("unk_token"):
            kinds[index] = TokenType.UNKNOWN
    return {
        Keys.Tokenizer.MODEL: GgufField("llama", STRING),
        Keys.Tokenizer.PRE: GgufField("default", STRING),
        Keys.Tokenizer.SCORES: GgufField(scores, ARRAY, F32),
        Keys.Tokenizer.ADD_PREFIX: GgufField(_adds_space(backend), BOOL),
    }


def _adds_space(backend: dict[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    for step in steps_of(backend["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
    return any(step["type"] == "Prepend" for step in steps_of(backend["normalizer"], "normalizers"))
